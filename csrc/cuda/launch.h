// The three forms of CUDA that are no C++: a launch and both kinds of shared array. As macros, the
// same source also compiles for the CPU, where tests/cuda_emulation runs it.
#pragma once

#include <cuda_runtime.h>

#ifndef WCMI_LAUNCH
#define WCMI_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define WCMI_SHARED(type, name, count) __shared__ type name[count]
#define WCMI_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* const name = reinterpret_cast<type*>(name##_raw)
#endif
