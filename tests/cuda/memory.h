// Memory that the test and the kernels share. Under emulation the kernels run on the CPU, in the test's own memory.
// Compiled by nvcc, each block of memory has a copy on the GPU of exactly its size, so that compute-sanitizer reports
// every access beyond it. to_gpu() and from_gpu() bring the two up to date before and after kernels run.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <vector>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace dlk {

class Memory {
 public:
  // All bytes are 0xff (NaN) until they are written.
  explicit Memory(size_t bytes) : own_(new char[bytes]) {
    std::memset(own_.get(), 0xff, bytes);
#ifdef __CUDACC__
    bytes_ = bytes;
    all().insert(this);
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // For the test itself.
  const void* read() const { return own_.get(); }
#ifdef __CUDACC__
  void* write() {
    changed_ = true;
    return own_.get();
  }
  ~Memory() {
    all().erase(this);
    cudaFree(copy_);
  }
  // For the kernels.
  void* data() {
    if (!copy_) check(cudaMalloc(&copy_, bytes_ ? bytes_ : 1));
    return copy_;
  }

  static void to_gpu() {
    for (Memory* memory : all()) {
      if (!memory->copy_ || !memory->changed_) continue;
      check(cudaMemcpy(memory->copy_, memory->own_.get(), memory->bytes_, cudaMemcpyHostToDevice));
      memory->changed_ = false;
    }
  }
  static int from_gpu() {
    if (const cudaError_t error = cudaDeviceSynchronize()) return error;
    for (Memory* memory : all()) {
      if (!memory->copy_ || memory->changed_) continue;
      check(cudaMemcpy(memory->own_.get(), memory->copy_, memory->bytes_, cudaMemcpyDeviceToHost));
    }
    return 0;
  }

 private:
  static void check(cudaError_t error) {
    if (!error) return;
    std::fprintf(stderr, "memory of the test: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
  static std::set<Memory*>& all() {
    static std::set<Memory*> memories;
    return memories;
  }
  size_t bytes_;
  void* copy_ = nullptr;
  bool changed_ = true;  // since it was copied to the GPU
#else
  void* write() { return own_.get(); }
  void* data() { return own_.get(); }
  static void to_gpu() {}
  static int from_gpu() { return 0; }

 private:
#endif
  std::unique_ptr<char[]> own_;
};

// Integers that kernels read or write.
template <class T>
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(const std::vector<T>& values) {
    if (values.empty()) return;
    memory_ = std::make_unique<Memory>(values.size() * sizeof(T));
    std::memcpy(memory_->write(), values.data(), values.size() * sizeof(T));
  }
  T operator[](size_t i) const { return static_cast<const T*>(memory_->read())[i]; }
  T* data() const { return memory_ ? static_cast<T*>(memory_->data()) : nullptr; }  // null if there are none

 private:
  std::unique_ptr<Memory> memory_;
};

}  // namespace dlk
