#include "boundary.h"

#include <iterator>

namespace dlk {
namespace {

thread_local LayerShape last_called{};
thread_local bool has_called = false;

}  // namespace

void remember_shape(const LayerShape& shape) {
  last_called = shape;
  has_called = true;
}

const LayerShape* last_shape() { return has_called ? &last_called : nullptr; }

CellKind cell_from_mode(const std::string& mode) {
  std::string known;
  for (CellKind cell : kCellKinds) {
    if (mode == mode_name(cell)) return cell;
    known += (known.empty() ? "" : cell == kCellKinds[std::size(kCellKinds) - 1] ? " or " : ", ");
    known += mode_name(cell);
  }
  throw std::invalid_argument("unknown mode '" + mode + "', expected " + known);
}

Weights weights_of_bits(int64_t bits) {
  switch (bits) {
    case 0:
      return Weights::given;
    case 16:
      return Weights::bf16;
    case 8:
      return Weights::int8;
    default:
      throw std::runtime_error(concat("bits must be 0, 8 or 16, got ", bits));
  }
}

}  // namespace dlk
