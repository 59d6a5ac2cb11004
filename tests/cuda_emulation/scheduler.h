// Runs each thread of a CUDA launch as a fibre of the CPU: what cuda_runtime.h asks of
// scheduler.cpp.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

namespace wcmi_emulation {

// As a default argument: where the call is.
struct Site {
  const char* file;
  int line;
  constexpr Site(const char* f = __builtin_FILE(), int l = __builtin_LINE()) : file(f), line(l) {}
};

// Where the running fibre is in its launch. A pointer, since modules that are loaded late have
// little room for variables of a thread.
struct Place {
  uint3 thread, block, block_dim, grid_dim;
};
extern __thread const Place* place __attribute__((tls_model("initial-exec")));

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t dynamic_shared;
  cudaStream_t stream;
  void (*run_thread)(void*);
  void* arguments;
};
void launch(const Launch& launch);

// The number of threads whose predicate is true.
int barrier(bool predicate, const char* operation, Site site);

enum class WarpOperation { kSync, kBallot, kShuffle };
// kBallot: the lanes whose value is not 0; kShuffle: the value of lane `source`.
uint64_t warp(WarpOperation operation, const char* name, unsigned mask, uint64_t value, int source,
              Site site);
int lane();
[[noreturn]] void fail(const char* what, Site site);

// The same array for every thread of a block that asks with the same key.
void* shared_array(const void* key, size_t bytes, size_t alignment, Site site = {});
void* dynamic_shared();
void memory_fence();

}  // namespace wcmi_emulation
