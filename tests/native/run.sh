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
# Products of bf16 in plain C++, so that their kernels run on any machine with AVX-512. Without it no kernel above AVX2
# could run, so they are left out here; `make build` compiles them.
units=-DDLK_EMULATE_BF16 bf16_test=bf16_test
if [ "$mode" != avx512 ] && ! grep -q avx512bw /proc/cpuinfo; then
  units=-DDLK_NO_AVX512 bf16_test=
fi
UNITS=${UNITS-$units}
FLAGS="$UNITS -std=c++17 -Wall -Wextra ${OPT:--O1} -g1 -fno-omit-frame-pointer -pthread $extra"
# The scalar build checks these for the same source; with them the others take half as long again to compile.
FEW=-fno-sanitize=null,alignment,object-size
export CXX FLAGS FEW build
mkdir -p "$build"

csrc=../../csrc
FLAGS="$FLAGS -I$csrc -I."
case $ISAS in
  all) tests="kernels_test attention_test simd_test $bf16_test" ;;
  scalar) FLAGS="$FLAGS -DDLK_NO_X86" tests="kernels_test attention_test" ;;
  *) echo "ISAS is all or scalar" >&2; exit 2 ;;
esac
isas=$(sed -n 's/^DLK_ISA_ROW(\([a-z0-9_]*\),.*/\1/p' "$csrc/core/isas.def")

compile() { # OBJECT SOURCE [FLAG...]: one line of the list that xargs works off
  echo "$@"
}
kernels() { # all that is free of torch; the slowest to compile first
  for isa in $(echo "$isas" | tac); do
    few=$FEW
    if [ "$isa" = scalar ]; then few=; fi
    for family in attention rnn; do
      compile "kernels-$family-$isa" "$csrc/$family/cpu/kernels_of_isa.cpp" "-DDLK_ISA=$isa" $few
    done
  done
  for source in "$csrc"/core/*.cpp "$csrc"/gemm/*.cpp "$csrc"/rnn/cpu/*.cpp "$csrc"/attention/cpu/*.cpp; do
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
