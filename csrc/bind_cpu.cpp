// Python module wcmi_fast._cpu. Pointers cross as integers; backends/cpu.py checks what they mean.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/simd_level.h"

namespace py = pybind11;
using wcmi::CpuKernels;
using wcmi::kFloat64;

namespace {

wcmi::SimdLevel levels[3];
int level_count = 0;
int selected = 0;

const CpuKernels& kernels() { return levels[selected].kernels; }

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<std::string> level_names() {
  std::vector<std::string> names;
  for (int i = 0; i < level_count; ++i) names.push_back(levels[i].name);
  return names;
}

void set_level(const std::string& name) {
  for (int i = 0; i < level_count; ++i) {
    if (name == levels[i].name) {
      selected = i;
      return;
    }
  }
  throw std::invalid_argument("unknown SIMD level " + name);
}

void critic_stats_fwd(int dtype, uintptr_t tile, int64_t first, int64_t images, int64_t N,
                      int64_t P, uintptr_t positives, uintptr_t row_max, uintptr_t row_sum,
                      int threads) {
  if (dtype == kFloat64) {
    kernels().critic_stats_fwd_f64(pointer<double>(tile), first, images, N, P,
                                   pointer<double>(positives), pointer<double>(row_max),
                                   pointer<double>(row_sum), threads);
  } else {
    kernels().critic_stats_fwd_f32(pointer<float>(tile), first, images, N, P,
                                   pointer<float>(positives), pointer<float>(row_max),
                                   pointer<float>(row_sum), threads);
  }
}

void critic_stats_lse(int dtype, uintptr_t row_max, uintptr_t row_sum, int64_t N, int64_t P,
                      bool zero_diagonal, uintptr_t lse) {
  if (dtype == kFloat64) {
    kernels().critic_stats_lse_f64(pointer<double>(row_max), pointer<double>(row_sum), N, P,
                                   zero_diagonal, pointer<double>(lse));
  } else {
    kernels().critic_stats_lse_f32(pointer<float>(row_max), pointer<float>(row_sum), N, P,
                                   zero_diagonal, pointer<float>(lse));
  }
}

void critic_stats_bwd(int dtype, uintptr_t tile, int64_t first, int64_t images, int64_t N,
                      int64_t P, uintptr_t lse, uintptr_t dpositives, uintptr_t dlse,
                      uintptr_t grad, int threads) {
  if (dtype == kFloat64) {
    kernels().critic_stats_bwd_f64(pointer<double>(tile), first, images, N, P, pointer<double>(lse),
                                   pointer<double>(dpositives), pointer<double>(dlse),
                                   pointer<double>(grad), threads);
  } else {
    kernels().critic_stats_bwd_f32(pointer<float>(tile), first, images, N, P, pointer<float>(lse),
                                   pointer<float>(dpositives), pointer<float>(dlse),
                                   pointer<float>(grad), threads);
  }
}

void linf_step(int dtype, uintptr_t x, uintptr_t grad, uintptr_t origin, int64_t count, double eps,
               double step_size, double lo, double hi, int threads) {
  kernels().linf_step(pointer<void>(x), pointer<void>(grad), pointer<void>(origin), count, dtype,
                      eps, step_size, lo, hi, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  level_count = wcmi::supported_levels(levels);
  selected = level_count - 1;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("levels", &level_names);
  m.def("level", [] { return std::string(levels[selected].name); });
  m.def("set_level", &set_level);
  m.def("critic_stats_fwd", &critic_stats_fwd, nogil);
  m.def("critic_stats_lse", &critic_stats_lse, nogil);
  m.def("critic_stats_bwd", &critic_stats_bwd, nogil);
  m.def("linf_step", &linf_step, nogil);
}
