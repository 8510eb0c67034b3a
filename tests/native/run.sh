#!/bin/sh
# Builds and runs the torch-free tests under sanitizers: run.sh [asan|tsan] [cases]
# CXX and OPT (-O1) choose compiler and optimisation, BUILD the folder of the objects.
set -eu
cd "$(dirname "$0")"
mode=${1:-asan}
cxx=${CXX:-g++}
build=${BUILD:-/tmp/dlkernels-native-$mode}
case $mode in
  asan) sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all"; cases=${2:-1500} ;;
  tsan) sanitizers="-fsanitize=thread"; cases=${2:-250} ;;
  *) echo "usage: run.sh [asan|tsan] [cases]" >&2; exit 2 ;;
esac
mkdir -p "$build"
csrc=../../csrc/cpu
objects=
compile_all() {
  for source in $csrc/isa/avx512.cpp $csrc/isa/avx2.cpp $csrc/isa/scalar.cpp $csrc/isa/dispatch.cpp $csrc/plan.cpp \
    $csrc/rnn_kernels.cpp $csrc/team.cpp kernels_test.cpp simd_test.cpp; do
    echo "$source"
  done | xargs -P 2 -I{} sh -c \
    "$cxx -std=c++17 -Wall -Wextra ${OPT:--O1} -g1 -fno-omit-frame-pointer $sanitizers -pthread -c {} -o $build/\$(basename {} .cpp).o"
}
compile_all
for name in avx512 avx2 scalar dispatch plan rnn_kernels team; do objects="$objects $build/$name.o"; done
$cxx $sanitizers -pthread "$build/simd_test.o" -o "$build/simd_test"
$cxx $sanitizers -pthread "$build/kernels_test.o" $objects -o "$build/kernels_test"
[ "$mode" = tsan ] || "$build/simd_test"
"$build/kernels_test" "$cases"
