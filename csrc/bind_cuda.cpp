// Python module wcmi_fast._cuda. Pointers cross as integers; backends/cuda.py checks what they
// mean.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace {

void linf_step(int dtype, uintptr_t x, uintptr_t grad, uintptr_t origin, int64_t count, double eps,
               double step_size, double lo, double hi, int device, uintptr_t stream) {
  const int error =
      wcmi::linf_step_cuda(reinterpret_cast<void*>(x), reinterpret_cast<const void*>(grad),
                           reinterpret_cast<const void*>(origin), count, dtype, eps, step_size, lo,
                           hi, device, reinterpret_cast<void*>(stream));
  if (error != 0) {
    throw std::runtime_error("linf_step_: the CUDA launch on device " + std::to_string(device) +
                             " failed: " + wcmi::cuda_error_text(error));
  }
}

}  // namespace

PYBIND11_MODULE(_cuda, m) { m.def("linf_step", &linf_step); }
