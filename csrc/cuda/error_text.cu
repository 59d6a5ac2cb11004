// What CUDA's error codes mean, in words.
#include <cuda_runtime.h>

#include "../kernels.h"

namespace wcmi {

const char* cuda_error_text(int error) {
  // CUDA's own words leave open what to do.
  if (error == cudaErrorInsufficientDriver) {
    return "no NVIDIA driver, or one older than the CUDA toolkit of this build; install a newer "
           "one";
  }
  if (error == cudaErrorNoKernelImageForDevice) {
    return "the build has no code for this GPU; rebuild with its CMAKE_CUDA_ARCHITECTURES";
  }
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace wcmi
