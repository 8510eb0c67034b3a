#!/bin/sh
# Parses every torch-free header by itself, as an editor does, which shows whether each header includes what it uses.
set -eu
cd "$(dirname "$0")/../../csrc"
command -v clang++ >/dev/null && CXX=clang++
export CXX="${CXX:-g++}"
find core simd gemm ./*/params.h ./*/cells ./*/cpu -name '*.h' | sort |
  xargs -P "${JOBS:-2}" -n 4 sh -c 'for header; do
    echo "#include \"$header\"" | "$CXX" -std=c++17 -Wall -Wextra -Werror -Wno-unused-function \
      -Wno-unused-const-variable -I. -fsyntax-only -x c++ - || { echo "headers.sh: $header does not stand alone" >&2; exit 255; }
  done' headers
echo "headers.sh: every torch-free header stands alone"
