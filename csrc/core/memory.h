// The errors of failed allocations, for code with torch's headers and for the kernels, which do not include them.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace dlk {

// Throws what becomes a RuntimeError in Python. The message begins like that of torch, because programs search for it.
[[noreturn]] inline void throw_out_of_memory(size_t bytes, const std::string& what) {
  throw std::runtime_error("DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
                           std::to_string(bytes) + " bytes for " + what);
}

[[noreturn]] inline void throw_too_large(const std::string& what) {
  throw std::runtime_error("Storage size calculation overflowed: the bytes of " + what + " exceed 64 bits");
}

}  // namespace dlk
