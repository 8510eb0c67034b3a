// What a failed allocation says, on the side of torch's headers and on that of the kernels.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace dlk {

// A RuntimeError in Python. Programs look for the first words, which are torch's own.
[[noreturn]] inline void throw_out_of_memory(size_t bytes, const std::string& what) {
  throw std::runtime_error("DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
                           std::to_string(bytes) + " bytes for " + what);
}

[[noreturn]] inline void throw_too_large(const std::string& what) {
  throw std::runtime_error("Storage size calculation overflowed: the bytes of " + what + " exceed 64 bits");
}

}  // namespace dlk
