#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "runtime_flags.h"
#include "simd/target.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dlk {
namespace {

std::atomic<bool> g_poison{false};
std::atomic<bool> g_scalar_machine{false};  // set by tests

// What an instruction set may need from the processor and the operating system, as bits.
enum Feature : unsigned {
  kAvx2 = 1 << 0,    // with fma and f16c
  kAvx512 = 1 << 1,  // f, dq, bw and vl
  kDots = 1 << 2,    // avx512_bf16 and avx512_vnni
  kTiles = 1 << 3,   // amx_tile, amx_bf16 and amx_int8, with the operating system's permission
};

struct Cpu {
  std::vector<std::pair<const char*, bool>> names;
  unsigned features = 0;
};

struct Row {
  Isa isa;
  const char* name;
  unsigned features;
  bool compiled;
};

constexpr Row kRows[] = {
#define DLK_ISA_ROW(name, features, vectors, bf16) {Isa::name, #name, features, DLK_COMPILES_##name},
#include "isas.def"
#undef DLK_ISA_ROW
};

static_assert(std::size(kRows) == kIsaCount, "rows are indexed by Isa");

const Row& row(Isa isa) { return kRows[static_cast<int>(isa)]; }

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// XCR0: which register files the OS saves on a context switch. Only to be read where OSXSAVE is set.
uint64_t xgetbv0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux permits the use of tiles only on request; the permission holds for all threads of the process and for the
// children that it forks. A process that DLKERNELS_CPU_ISA keeps from using tiles does not request it, because a
// process with the permission may not have signal stacks too small for the tiles' state.
bool ask_for_tiles() {
#if defined(__linux__) && defined(DLK_AMX) && !defined(DLK_EMULATE_BF16)
  const char* cap = std::getenv("DLKERNELS_CPU_ISA");
  if (cap && *cap && std::strcmp(cap, isa_name(Isa::amx)) != 0) return false;
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
#else
  return false;
#endif
}

bool bit(uint64_t word, int index) { return (word >> index) & 1; }

Cpu detect() {
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  const uint64_t xcr0 = bit(basic.ecx, 27) ? xgetbv0() : 0;
  const bool os_ymm = (xcr0 & 0x6) == 0x6;              // xmm, ymm
  const bool os_zmm = os_ymm && (xcr0 & 0xe0) == 0xe0;  // opmask, both halves of zmm
  const bool os_amx = (xcr0 & 0x60000) == 0x60000;      // tile configuration and data
  const bool avx = bit(basic.ecx, 28), fma = bit(basic.ecx, 12), f16c = bit(basic.ecx, 29);
  const bool avx2 = bit(extended.ebx, 5);
  const bool avx512f = bit(extended.ebx, 16), avx512dq = bit(extended.ebx, 17);
  const bool avx512bw = bit(extended.ebx, 30), avx512vl = bit(extended.ebx, 31);

  const bool avx512_bf16 = bit(more.eax, 5), avx512_vnni = bit(extended.ecx, 11);
  const bool amx_tile = bit(extended.edx, 24), amx_bf16 = bit(extended.edx, 22), amx_int8 = bit(extended.edx, 25);
  const bool amx_granted = os_amx && amx_tile && amx_bf16 && amx_int8 && ask_for_tiles();

  Cpu cpu;
  cpu.names = {{"avx", avx},
               {"f16c", f16c},
               {"fma", fma},
               {"avx2", avx2},
               {"avx512f", avx512f},
               {"avx512dq", avx512dq},
               {"avx512bw", avx512bw},
               {"avx512vl", avx512vl},
               {"avx512_vnni", avx512_vnni},
               {"avx512_bf16", avx512_bf16},
               {"avx512_fp16", bit(extended.edx, 23)},
               {"amx_tile", amx_tile},
               {"amx_bf16", amx_bf16},
               {"amx_int8", amx_int8},
               {"os_ymm", os_ymm},
               {"os_zmm", os_zmm},
               {"os_amx", os_amx},
               {"amx_granted", amx_granted}};
  const bool has_avx2 = os_ymm && avx && avx2 && fma && f16c;
#if defined(DLK_EMULATE_AVX512)
  const bool has_avx512 = has_avx2;
#else
  const bool has_avx512 = has_avx2 && os_zmm && avx512f && avx512dq && avx512bw && avx512vl;
#endif
#if defined(DLK_EMULATE_BF16)
  const bool has_dots = has_avx512, has_tiles = has_avx512;
#else
  const bool has_dots = has_avx512 && avx512_bf16 && avx512_vnni, has_tiles = has_avx512 && avx512_vnni && amx_granted;
#endif
  cpu.features = has_avx2 * kAvx2 | has_avx512 * kAvx512 | has_dots * kDots | has_tiles * kTiles;
  return cpu;
}

#else

Cpu detect() { return {}; }

#endif

const Cpu& cpu() {
  static const Cpu found = detect();
  return found;
}

bool runs_here(const Row& row) {
  const unsigned features = g_scalar_machine.load(std::memory_order_relaxed) ? 0 : cpu().features;
  return row.compiled && (row.features & ~features) == 0;
}

const char* asked_by_environment() {
  const char* name = std::getenv("DLKERNELS_CPU_ISA");
  return name && *name ? name : nullptr;
}

// The last row that this process may use: the processor runs it, and it is not behind the row that DLKERNELS_CPU_ISA
// names.
Isa find_best_allowed() {
  const char* name = asked_by_environment();
  Isa cap = kRows[std::size(kRows) - 1].isa;
  if (name) {
    try {
      cap = isa_from_name(name);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("DLKERNELS_CPU_ISA: ") + error.what());
    }
  }
  Isa best = Isa::scalar;
  for (const Row& row : kRows) {
    if (row.isa <= cap && runs_here(row)) best = row.isa;
  }
  return best;
}

// The environment is read once, unless it holds an error: then each call reads it again and throws.
Isa best_allowed() {
  static const Isa best = find_best_allowed();
  return g_scalar_machine.load(std::memory_order_relaxed) ? Isa::scalar : best;
}

constexpr int kAutomatic = -1;
std::atomic<int> g_override{kAutomatic};

}  // namespace

bool poison() { return g_poison.load(std::memory_order_relaxed); }
void set_poison(bool on) { g_poison.store(on, std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return row(isa).name; }

Isa isa_from_name(const std::string& name) {
  std::string known;
  for (const Row& row : kRows) {
    if (name == row.name) return row.isa;
    const bool last = &row == std::end(kRows) - 1;
    known += std::string(known.empty() ? "" : last ? " or " : ", ") + row.name;
  }
  throw std::invalid_argument("unknown instruction set '" + name + "', expected " + known);
}

const std::vector<std::pair<const char*, bool>>& cpu_features() { return cpu().names; }

std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas;
  for (const Row& row : kRows) {
    if (row.compiled) isas.push_back(row.isa);
  }
  return isas;
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const Row& row : kRows) {
    if (row.isa <= best_allowed() && runs_here(row)) isas.push_back(row.isa);
  }
  return isas;
}

Isa current_isa() {
  const int chosen = g_override.load(std::memory_order_relaxed);
  return chosen == kAutomatic ? best_allowed() : static_cast<Isa>(chosen);
}

void set_isa(Isa isa) {
  if (isa > best_allowed() || !runs_here(row(isa))) {
    throw std::invalid_argument(std::string(isa_name(isa)) +
                                " is more than this machine or DLKERNELS_CPU_ISA allows: " + isa_name(best_allowed()));
  }
  g_override.store(static_cast<int>(isa), std::memory_order_relaxed);
}

void reset_isa() { g_override.store(kAutomatic, std::memory_order_relaxed); }

bool prefers_torch() {
  if (best_allowed() != Isa::scalar || g_override.load(std::memory_order_relaxed) != kAutomatic) return false;
  const char* name = asked_by_environment();
  return !name || std::strcmp(name, isa_name(Isa::scalar)) != 0;
}

void pretend_scalar_machine(bool on) { g_scalar_machine.store(on, std::memory_order_relaxed); }

}  // namespace dlk
