#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
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

struct Cpu {
  std::vector<std::pair<const char*, bool>> features;
  Isa best = Isa::scalar;
};

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

// Linux grants the tiles' state to a process that asks, for all its threads and those it forks. Who will not use them
// does not ask: a process that has them may not have signal stacks too small for their state.
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

  const bool avx512_bf16 = bit(more.eax, 5);
  const bool amx_tile = bit(extended.edx, 24), amx_bf16 = bit(extended.edx, 22);
  const bool amx_granted = os_amx && amx_tile && amx_bf16 && ask_for_tiles();

  Cpu cpu;
  cpu.features = {{"avx", avx},
                  {"f16c", f16c},
                  {"fma", fma},
                  {"avx2", avx2},
                  {"avx512f", avx512f},
                  {"avx512dq", avx512dq},
                  {"avx512bw", avx512bw},
                  {"avx512vl", avx512vl},
                  {"avx512_vnni", bit(extended.ecx, 11)},
                  {"avx512_bf16", avx512_bf16},
                  {"avx512_fp16", bit(extended.edx, 23)},
                  {"amx_tile", amx_tile},
                  {"amx_bf16", amx_bf16},
                  {"os_ymm", os_ymm},
                  {"os_zmm", os_zmm},
                  {"os_amx", os_amx},
                  {"amx_granted", amx_granted}};
  if (os_ymm && avx && avx2 && fma && f16c) {
    cpu.best = Isa::avx2;
#if defined(DLK_EMULATE_AVX512)
    cpu.best = Isa::avx512;
#else
    if (os_zmm && avx512f && avx512dq && avx512bw && avx512vl) cpu.best = Isa::avx512;
#endif
#if defined(DLK_EMULATE_BF16)
    const bool dots = true, tiles = true;
#else
    const bool dots = avx512_bf16, tiles = amx_granted;
#endif
    const auto compiled = [&](Isa isa) { return isa <= compiled_isas().back(); };
    if (cpu.best == Isa::avx512 && dots && compiled(Isa::avx512_bf16)) cpu.best = Isa::avx512_bf16;
    if (cpu.best == Isa::avx512_bf16 && tiles && compiled(Isa::amx)) cpu.best = Isa::amx;
  }
  return cpu;
}

#else

Cpu detect() { return {}; }

#endif

const Cpu& cpu() {
  static const Cpu found = detect();
  return found;
}

Isa read_cap() {
  const char* name = std::getenv("DLKERNELS_CPU_ISA");
  const Isa best = cpu().best;
  if (!name || !*name) return best;
  try {
    return std::min(isa_from_name(name), best);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("DLKERNELS_CPU_ISA: ") + error.what());
  }
}

// The best this process may use. The environment is read once; an error is not remembered.
Isa best_allowed() {
  static const Isa best = read_cap();
  return best;
}

constexpr int kAutomatic = -1;
std::atomic<int> g_override{kAutomatic};

}  // namespace

bool poison() { return g_poison.load(std::memory_order_relaxed); }
void set_poison(bool on) { g_poison.store(on, std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
  }
  return "?";
}

Isa isa_from_name(const std::string& name) {
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument("unknown instruction set '" + name +
                              "', expected scalar, avx2, avx512, avx512_bf16 or amx");
}

const std::vector<std::pair<const char*, bool>>& cpu_features() { return cpu().features; }

std::vector<Isa> compiled_isas() {
#if defined(DLK_AMX)
  return {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};
#elif defined(DLK_AVX512_BF16)
  return {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16};
#elif defined(__x86_64__)
  return {Isa::scalar, Isa::avx2, Isa::avx512};
#else
  return {Isa::scalar};
#endif
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : compiled_isas()) {
    if (isa <= best_allowed()) isas.push_back(isa);
  }
  return isas;
}

Isa current_isa() {
  const int chosen = g_override.load(std::memory_order_relaxed);
  return chosen == kAutomatic ? best_allowed() : static_cast<Isa>(chosen);
}

void set_isa(Isa isa) {
  if (isa > best_allowed()) {
    throw std::invalid_argument(std::string(isa_name(isa)) +
                                " is more than this machine or DLKERNELS_CPU_ISA allows: " + isa_name(best_allowed()));
  }
  g_override.store(static_cast<int>(isa), std::memory_order_relaxed);
}

void reset_isa() { g_override.store(kAutomatic, std::memory_order_relaxed); }

}  // namespace dlk
