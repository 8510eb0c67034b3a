#!/bin/sh
# Builds and runs the torch-free tests under sanitizers: run.sh [asan|tsan|avx512] [cases] [seed]
# CXX is the compiler, OPT its optimisation level (-Og), BUILD the folder of the objects. UNITS= (empty) multiplies bf16
# with the machine's own instructions instead of their emulation. ISAS=scalar compiles the scalar kernels only, which is
# enough for tsan: the barriers are in code that all instruction sets share. The mode avx512 uses no sanitizers: it runs
# the AVX-512 kernels on a machine that has AVX2 only, through avx512_emulation.h (GCC only).
set -eu
cd "$(dirname "$0")"
mode=${1:-asan}
ISAS=${ISAS:-all}
build=${BUILD:-$PWD/../../build/native-test-$mode-$ISAS}
case $mode in
  asan) extra="-fsanitize=address,undefined -fno-sanitize-recover=all" cases=300 ;;
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
# Products of bf16 are emulated in plain C++, so that the kernels that use them run on any machine with AVX-512. On a
# machine without AVX-512 no kernel above AVX2 can run, so those are not compiled here; `make build` compiles them.
units=-DDLK_EMULATE_BF16 bf16_test=bf16_test
if [ "$mode" != avx512 ] && ! grep -q avx512bw /proc/cpuinfo; then
  units=-DDLK_NO_AVX512 bf16_test=
fi
UNITS=${UNITS-$units}
FLAGS="$UNITS -std=c++17 -Wall -Wextra ${OPT:--Og} -g1 -fno-omit-frame-pointer -pthread $extra"
# The other instruction sets are compiled from the same source as the scalar one, which is built with these checks.
# With them the others take twice as long to compile (recurrent kernels for avx2: pointer-overflow alone 79 s, not 59).
FEW=-fno-sanitize=null,alignment,object-size,pointer-overflow
# Calls of functions that check an address compile faster than checks in place (the same kernels: 26 s, not 44).
case $mode-$CXX in
  asan-*clang*) FLAGS="$FLAGS -mllvm -asan-instrumentation-with-call-threshold=0" ;;
  asan-*) FLAGS="$FLAGS --param asan-instrumentation-with-call-threshold=0" ;;
esac
export CXX FLAGS FEW build
mkdir -p "$build"

csrc=../../csrc
FLAGS="$FLAGS -I$csrc -I."
case $ISAS in
  all) tests="kernels_test variants_test attention_test simd_test $bf16_test" ;;
  scalar) FLAGS="$FLAGS -DDLK_NO_X86" tests="kernels_test variants_test attention_test" ;;
  *) echo "ISAS is all or scalar" >&2; exit 2 ;;
esac
isas=$(sed -n 's/^DLK_ISA_ROW(\([a-z0-9_]*\),.*/\1/p' "$csrc/core/isas.def")

compile() { # OBJECT SOURCE [FLAG...]: prints one line of the list from which xargs below takes the compilations
  echo "$@"
}
kernels() { # every source that does not need torch, the slowest to compile first
  for isa in $(echo "$isas" | tac); do
    few=$FEW
    if [ "$isa" = scalar ]; then few=; fi
    for source in $(cd "$csrc" && find . -name kernels_of_isa.cpp | sort -r); do
      compile "kernels-$(echo "${source#./}" | tr / -)-$isa" "$csrc/${source#./}" "-DDLK_ISA=$isa" $few
    done
  done
  for source in "$csrc"/core/*.cpp "$csrc"/gemm/*.cpp "$csrc"/*/cpu/*.cpp; do
    case $source in
      *"*"* | *kernels_of_isa.cpp) ;;
      *) compile "kernels-$(echo "${source#"$csrc/"}" | tr / -)" "$source" ;;
    esac
  done
}
simd() {
  for isa in scalar avx2 avx512; do
    few=$FEW
    if [ "$isa" = scalar ]; then few=; fi
    compile "simd_test-$isa" simd_test_of_isa.cpp "-DDLK_ISA=$isa" $few
  done
}
bf16() {
  for isa in amx avx512_bf16; do
    compile "bf16_test-$isa" bf16_test_of_isa.cpp "-DDLK_ISA=$isa" -UDLK_EMULATE_BF16 "$FEW"
    compile "bf16_test-emulated-$isa" bf16_test_of_isa.cpp "-DDLK_ISA=$isa" -DDLK_EMULATE_BF16 \
      "-DDLK_ISA_NAMESPACE=emulated_$isa" "$FEW"
  done
}
rm -f "$build"/*.o
{
  kernels
  for name in $tests; do compile "$name" "$name.cpp"; done
  case $tests in *simd_test*) simd ;; esac
  case $tests in *bf16_test*) bf16 ;; esac
} | xargs -P "${JOBS:-2}" -L1 sh -c 'object=$0 source=$1; shift; $CXX $FLAGS "$@" -c "$source" -o "$build/$object.o"'
for name in $tests; do
  case $name in
    simd_test | bf16_test) parts="$build/$name"-*.o ;;
    *) parts="$build"/kernels-*.o ;;
  esac
  # shellcheck disable=SC2086
  $CXX $FLAGS $parts "$build/$name.o" -o "$build/$name"
done

for name in $tests; do
  case $mode-$name in
    tsan-simd_test | tsan-bf16_test) ;;
    *-simd_test | *-bf16_test) "$build/$name" ;;
    *) "$build/$name" "${2:-$cases}" "${3:-0}" ;;
  esac
done
