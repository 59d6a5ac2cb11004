// Python module wcmi_fast._cuda. Pointers cross as integers; backends/cuda.py checks what they
// mean.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace {

typedef uintptr_t Address;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

void check(const char* function, int device, int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string(function) + ": the CUDA launch on device " +
                           std::to_string(device) + " failed: " + wcmi::cuda_error_text(error) +
                           " (error " + std::to_string(error) + ")");
}

void critic_stats_fwd(int dtype, Address z, Address h, int64_t N, int64_t P, int64_t U, int which,
                      double tau, Address stats, int device, Address stream) {
  check("critic_stats", device,
        wcmi::critic_stats_fwd_cuda(pointer(z), pointer(h), N, P, U, dtype, which, tau,
                                    pointer(stats), device, pointer(stream)));
}

void critic_stats_bwd(int dtype, Address d, Address z, Address h, Address lse, int64_t N, int64_t P,
                      int64_t U, int which, Address dz, Address dh, Address workspace, int device,
                      Address stream) {
  check("critic_stats", device,
        wcmi::critic_stats_bwd_cuda(pointer(d), pointer(z), pointer(h), pointer(lse), N, P, U,
                                    dtype, which, pointer(dz), pointer(dh), pointer(workspace),
                                    device, pointer(stream)));
}

void score_stats_fwd(int dtype, Address scores, int64_t N, int64_t P, int which, double tau,
                     Address stats, int device, Address stream) {
  check("score_stats", device,
        wcmi::score_stats_fwd_cuda(pointer(scores), N, P, dtype, which, tau, pointer(stats), device,
                                   pointer(stream)));
}

void score_stats_bwd(int dtype, Address d, Address scores, Address lse, int64_t N, int64_t P,
                     int which, Address dscores, int device, Address stream) {
  check("score_stats", device,
        wcmi::score_stats_bwd_cuda(pointer(d), pointer(scores), pointer(lse), N, P, dtype, which,
                                   pointer(dscores), device, pointer(stream)));
}

void dv_value(int dtype, Address positives, Address lse, int64_t N, int64_t P, bool zero_diagonal,
              Address value, Address dlse, int device, Address stream) {
  check("dv_value", device,
        wcmi::dv_value_cuda(pointer(positives), pointer(lse), N, P, zero_diagonal, dtype,
                            pointer(value), pointer(dlse), device, pointer(stream)));
}

void linf_step(int dtype, Address x, Address grad, Address origin, int64_t count, double eps,
               double step_size, double lo, double hi, int device, Address stream) {
  check("linf_step_", device,
        wcmi::linf_step_cuda(pointer(x), pointer(grad), pointer(origin), count, dtype, eps,
                             step_size, lo, hi, device, pointer(stream)));
}

void linf_start(int dtype, Address x, Address origin, int64_t count, double eps, int64_t seed,
                double lo, double hi, int device, Address stream) {
  check("linf_start_", device,
        wcmi::linf_start_cuda(pointer(x), pointer(origin), count, dtype, eps, seed, lo, hi, device,
                              pointer(stream)));
}

void l2_step(int dtype, Address x, Address grad, Address origin, int64_t rows, int64_t size,
             double eps, double step_size, double lo, double hi, int device, Address stream) {
  check("l2_step_", device,
        wcmi::l2_step_cuda(pointer(x), pointer(grad), pointer(origin), rows, size, dtype, eps,
                           step_size, lo, hi, device, pointer(stream)));
}

void keep_best(int value_dtype, Address best_x, Address best_value, Address x, Address value,
               int64_t rows, int64_t row_bytes, int device, Address stream) {
  check("keep_best_", device,
        wcmi::keep_best_cuda(pointer(best_x), pointer(best_value), pointer(x), pointer(value), rows,
                             row_bytes, value_dtype, device, pointer(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("critic_stats_fwd", &critic_stats_fwd);
  m.def("critic_stats_bwd", &critic_stats_bwd);
  m.def("critic_stats_bwd_parts", &wcmi::critic_stats_bwd_parts);
  m.def("score_stats_fwd", &score_stats_fwd);
  m.def("score_stats_bwd", &score_stats_bwd);
  m.def("dv_value", &dv_value);
  m.def("linf_step", &linf_step);
  m.def("linf_start", &linf_start);
  m.def("l2_step", &l2_step);
  m.def("keep_best", &keep_best);
}
