// Python module wcmi_fast._cpu. Pointers cross as integers; backends/cpu.py checks what they mean.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/simd_level.h"

namespace py = pybind11;
using wcmi::CpuKernels;

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

template <typename T>
const wcmi::CriticStatsKernels<T>& critic_stats_kernels();
template <>
const wcmi::CriticStatsKernels<float>& critic_stats_kernels() {
  return kernels().critic_stats_f32;
}
template <>
const wcmi::CriticStatsKernels<double>& critic_stats_kernels() {
  return kernels().critic_stats_f64;
}

using Addresses = std::array<uintptr_t, 7>;  // CriticStatsArrays, in its order
using TileSizes = std::array<int64_t, 5>;    // CriticStatsTile, in its order

template <typename T>
wcmi::CriticStatsArrays<T> arrays(const Addresses& at) {
  return {pointer<T>(at[0]), pointer<T>(at[1]), pointer<T>(at[2]), pointer<T>(at[3]),
          pointer<T>(at[4]), pointer<T>(at[5]), pointer<T>(at[6])};
}

template <typename T>
wcmi::CriticStatsTile<T> tile_of(uintptr_t scores, const TileSizes& sizes) {
  return {pointer<T>(scores), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

template <typename T>
void critic_stats_fwd(uintptr_t scores, const TileSizes& sizes, const Addresses& out, double tau,
                      uintptr_t workspace, int threads) {
  critic_stats_kernels<T>().fwd(tile_of<T>(scores, sizes), arrays<T>(out), tau,
                                pointer<T>(workspace), threads);
}

template <typename T>
void critic_stats_finish(const Addresses& out, int64_t count, double tau, int threads) {
  critic_stats_kernels<T>().finish(arrays<T>(out), count, tau, threads);
}

template <typename T>
void dv_value(uintptr_t positives, uintptr_t lse, int64_t N, int64_t P, bool zero_diagonal,
              uintptr_t value, uintptr_t dlse) {
  critic_stats_kernels<T>().dv_value(pointer<T>(positives), pointer<T>(lse), N, P, zero_diagonal,
                                     pointer<T>(value), pointer<T>(dlse));
}

template <typename T>
void critic_stats_bwd(uintptr_t scores, const TileSizes& sizes, uintptr_t lse, const Addresses& d,
                      uintptr_t grad, uintptr_t workspace, int threads) {
  critic_stats_kernels<T>().bwd(tile_of<T>(scores, sizes), pointer<T>(lse), arrays<T>(d),
                                pointer<T>(grad), pointer<T>(workspace), threads);
}

template <typename T>
void define_critic_stats(py::module_ m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("fwd", &critic_stats_fwd<T>, nogil);
  m.def("finish", &critic_stats_finish<T>, nogil);
  m.def("dv_value", &dv_value<T>, nogil);
  m.def("bwd", &critic_stats_bwd<T>, nogil);
}

template <typename T>
const wcmi::CriticTailKernels<T>& critic_tail_kernels();
template <>
const wcmi::CriticTailKernels<float>& critic_tail_kernels() {
  return kernels().critic_tail_f32;
}
template <>
const wcmi::CriticTailKernels<double>& critic_tail_kernels() {
  return kernels().critic_tail_f64;
}

template <typename T>
void critic_tail_fwd(uintptr_t rows, int64_t stride, int64_t count, int64_t U, uintptr_t bias,
                     double eps, uintptr_t rstd, int threads) {
  critic_tail_kernels<T>().fwd(pointer<T>(rows), stride, count, U, pointer<T>(bias), eps,
                               pointer<T>(rstd), threads);
}

template <typename T>
void critic_tail_bwd(uintptr_t d, uintptr_t rows, int64_t stride, int64_t count, int64_t U,
                     uintptr_t rstd, uintptr_t out, int threads) {
  critic_tail_kernels<T>().bwd(pointer<T>(d), pointer<T>(rows), stride, count, U, pointer<T>(rstd),
                               pointer<T>(out), threads);
}

template <typename T>
void define_critic_tail(py::module_ m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("fwd", &critic_tail_fwd<T>, nogil);
  m.def("bwd", &critic_tail_bwd<T>, nogil);
}

void linf_step(int dtype, uintptr_t x, uintptr_t grad, uintptr_t origin, int64_t count, double eps,
               double step_size, double lo, double hi, int threads) {
  kernels().linf_step(pointer<void>(x), pointer<void>(grad), pointer<void>(origin), count, dtype,
                      eps, step_size, lo, hi, threads);
}

void linf_start(int dtype, uintptr_t x, uintptr_t origin, int64_t count, double eps, int64_t seed,
                double lo, double hi, int threads) {
  kernels().linf_start(pointer<void>(x), pointer<void>(origin), count, dtype, eps, seed, lo, hi,
                       threads);
}

void l2_step(int dtype, uintptr_t x, uintptr_t grad, uintptr_t origin, int64_t rows, int64_t size,
             double eps, double step_size, double lo, double hi, int threads) {
  kernels().l2_step(pointer<void>(x), pointer<void>(grad), pointer<void>(origin), rows, size, dtype,
                    eps, step_size, lo, hi, threads);
}

void keep_best(int value_dtype, uintptr_t best_x, uintptr_t best_value, uintptr_t x,
               uintptr_t value, int64_t rows, int64_t row_bytes, int threads) {
  kernels().keep_best(pointer<void>(best_x), pointer<void>(best_value), pointer<void>(x),
                      pointer<void>(value), rows, row_bytes, value_dtype, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  level_count = wcmi::supported_levels(levels);
  selected = level_count - 1;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("levels", &level_names);
  m.def("level", [] { return std::string(levels[selected].name); });
  m.def("set_level", &set_level);
  m.def("critic_stats_workspace", &wcmi::critic_stats_workspace);
  define_critic_stats<float>(m.def_submodule("critic_stats_f32"));
  define_critic_stats<double>(m.def_submodule("critic_stats_f64"));
  define_critic_tail<float>(m.def_submodule("critic_tail_f32"));
  define_critic_tail<double>(m.def_submodule("critic_tail_f64"));
  m.def("linf_step", &linf_step, nogil);
  m.def("linf_start", &linf_start, nogil);
  m.def("l2_step", &l2_step, nogil);
  m.def("keep_best", &keep_best, nogil);
}
