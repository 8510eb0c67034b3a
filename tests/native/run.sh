#!/bin/sh
# Builds and runs the torch-free tests under sanitizers: run.sh [asan|tsan] [cases] [seed]
# CXX and OPT (-O1) choose compiler and optimisation, BUILD the folder of the objects; with UNITS= bf16 uses what
# the machine has for it in place of the emulation.
set -eu
cd "$(dirname "$0")"
mode=${1:-asan}
build=${BUILD:-/tmp/dlkernels-native-$mode}
case $mode in
  asan) sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all" cases=500 ;;
  tsan) sanitizers="-fsanitize=thread" cases=250 ;;
  *) echo "usage: run.sh [asan|tsan] [cases] [seed]" >&2; exit 2 ;;
esac
CXX=${CXX:-g++}
# Products of bf16 in plain C++, so that their kernels run on any machine with AVX-512.
UNITS=${UNITS--DDLK_EMULATE_BF16}
FLAGS="$UNITS -std=c++17 -Wall -Wextra ${OPT:--O1} -g1 -fno-omit-frame-pointer -pthread $sanitizers"
# The scalar build checks these for the same source; with them the others take half as long again to compile.
FEW=-fno-sanitize=null,alignment,object-size
export CXX FLAGS FEW build
mkdir -p "$build"

csrc=../../csrc/cpu
# The slowest to compile first.
kernels="isa/avx512 isa/avx512_bf16 isa/avx2 isa/attention_avx512_bf16 isa/attention_amx
  isa/attention_avx512 isa/attention_avx2 isa/scalar isa/attention_scalar
  isa/dispatch plan rnn_kernels team attention_plan attention_kernels"
objects=
for name in $kernels; do objects="$objects $build/$(basename "$name").o"; done
{
  for name in $kernels; do echo "$csrc/$name.cpp"; done
  echo kernels_test.cpp
  echo attention_test.cpp
  echo simd_test.cpp
  echo bf16_test.cpp
} | xargs -P 2 -I{} sh -c 'case {} in *avx* | *amx*) few=$FEW ;; *) few= ;; esac
  $CXX $FLAGS $few -c {} -o "$build/$(basename {} .cpp).o"'
# shellcheck disable=SC2086
$CXX $FLAGS $objects "$build/kernels_test.o" -o "$build/kernels_test"
# shellcheck disable=SC2086
$CXX $FLAGS $objects "$build/attention_test.o" -o "$build/attention_test"
# shellcheck disable=SC2086
$CXX $FLAGS "$build/simd_test.o" -o "$build/simd_test"
# shellcheck disable=SC2086
$CXX $FLAGS "$build/bf16_test.o" -o "$build/bf16_test"

[ "$mode" = tsan ] || "$build/simd_test"
[ "$mode" = tsan ] || "$build/bf16_test"
"$build/kernels_test" "${2:-$cases}" "${3:-0}"
"$build/attention_test" "${2:-$cases}" "${3:-0}"
