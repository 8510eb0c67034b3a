#!/bin/sh
# Builds and runs the torch-free tests under sanitizers: run.sh [asan|tsan|avx512] [cases] [seed]
# CXX and OPT (-O1) choose compiler and optimisation, BUILD the folder of the objects; with UNITS= bf16 uses what
# the machine has for it in place of the emulation. ISAS=scalar compiles no other kernels: barriers stand in the code that
# all instruction sets share. avx512 is without sanitizers: it runs the kernels for AVX-512 where there is AVX2 alone,
# by avx512_emulation.h (GCC).
set -eu
cd "$(dirname "$0")"
mode=${1:-asan}
ISAS=${ISAS:-all}
build=${BUILD:-/tmp/dlkernels-native-$mode-$ISAS}
case $mode in
  asan) extra="-fsanitize=address,undefined -fno-sanitize-recover=all" cases=500 ;;
  tsan) extra="-fsanitize=thread" cases=250 ;;
  avx512)
    if ! grep -q avx2 /proc/cpuinfo || grep -q avx512bw /proc/cpuinfo; then
      echo "run.sh avx512: nothing is emulated, that is for machines that have AVX2 and no AVX-512"
      exit
    fi
    extra="-DDLK_EMULATE_AVX512 -include avx512_emulation.h -Wno-psabi" cases=1000 ;;
  *) echo "usage: run.sh [asan|tsan|avx512] [cases] [seed]" >&2; exit 2 ;;
esac
CXX=${CXX:-g++}
# Products of bf16 in plain C++, so that their kernels run on any machine with AVX-512. Without it none of them could run,
# so they are left out here, as for an assembler that does not know them; `make build` compiles them.
units=-DDLK_EMULATE_BF16 bf16_test=bf16_test
if [ "$mode" != avx512 ] && ! grep -q avx512bw /proc/cpuinfo; then
  units=-DDLK_OLD_ASSEMBLER bf16_test=
fi
UNITS=${UNITS-$units}
FLAGS="$UNITS -std=c++17 -Wall -Wextra ${OPT:--O1} -g1 -fno-omit-frame-pointer -pthread $extra"
# The scalar build checks these for the same source; with them the others take half as long again to compile.
FEW=-fno-sanitize=null,alignment,object-size
export CXX FLAGS FEW build
mkdir -p "$build"

csrc=../../csrc/cpu
kernels="isa/scalar isa/attention_scalar isa/dispatch plan rnn_kernels team attention_plan attention_kernels"
tests="kernels_test attention_test"
case $ISAS in
  all)  # the slowest to compile first
    kernels="isa/avx512 isa/avx512_bf16 isa/avx2 isa/attention_avx512_bf16 isa/attention_amx isa/attention_avx512
      isa/attention_avx2 $kernels"
    tests="$tests simd_test $bf16_test" ;;
  scalar) FLAGS="$FLAGS -DDLK_NO_X86" ;;
  *) echo "ISAS is all or scalar" >&2; exit 2 ;;
esac
objects=
for name in $kernels; do objects="$objects $build/$(basename "$name").o"; done
{
  for name in $kernels; do echo "$csrc/$name.cpp"; done
  for name in $tests; do echo "$name.cpp"; done
} | xargs -P "${JOBS:-2}" -I{} sh -c 'case {} in *avx* | *amx*) few=$FEW ;; *) few= ;; esac
  $CXX $FLAGS $few -c {} -o "$build/$(basename {} .cpp).o"'
for name in $tests; do
  case $name in simd_test | bf16_test) kernels_of= ;; *) kernels_of=$objects ;; esac
  # shellcheck disable=SC2086
  $CXX $FLAGS $kernels_of "$build/$name.o" -o "$build/$name"
done

for name in $tests; do
  case $mode-$name in
    tsan-simd_test | tsan-bf16_test) ;;
    *-simd_test | *-bf16_test) "$build/$name" ;;
    *) "$build/$name" "${2:-$cases}" "${3:-0}" ;;
  esac
done
