// Prints the plans for an H200 at the sizes of docs/cuda.md and some others, one per line. check_resident() in
// compiled.py reads them:
//   cell dtype H B D way kind slices groups groups_at_once units columns threads shared_bytes
#include <cstdio>
#include <initializer_list>

#include "rnn/cuda/sequence.h"

int main() {
  using namespace dlk;
  const char* const dtypes[] = {"f32", "f64", "bf16", "f16"};
  const char* const kinds[] = {"cluster", "grid", "steps"};
  for (CellKind cell : kCellKinds) {
    if (cell == CellKind::rnn_relu) continue;  // its plans are those of rnn_tanh
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (int H : {128, 256, 512, 640, 768, 1024, 1536, 2048}) {
        for (int B : {1, 2, 4, 16, 64, 128}) {
          for (int D : {1, 2}) {
            for (bool backward : {false, true}) {
              const LayerShape shape{cell, dtype, 100, B, H, H, 0, D, int64_t{100} * B, false, Weights::given, false};
              const SequencePlan plan = sequence_plan(shape, kH200, backward);
              std::printf("%s %s %d %d %d %s %s %d %d %d %d %d %d %d\n",
                          cell == CellKind::rnn_tanh ? "rnn" : mode_name(cell), dtypes[static_cast<int>(dtype)], H, B,
                          D, backward ? "backward" : "forward", kinds[plan.kind], plan.slices, plan.groups,
                          plan.groups_at_once, plan.units, plan.columns, kSequenceThreads, plan.layout.bytes);
            }
          }
        }
      }
    }
  }
}
