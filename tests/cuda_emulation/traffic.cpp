// Counts the bytes that kernels read and write in one range of addresses: the accesses that
// -fsanitize=thread reports, received here instead of by ThreadSanitizer's library.
#include <stdint.h>

namespace {

struct Watched {
  uintptr_t begin, end;
  int64_t read, written;
};
Watched watched;

void count(const void* address, int64_t bytes, int64_t* total) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at >= watched.begin && at < watched.end) *total += bytes;
}

}  // namespace

#define WCMI_CONTROL extern "C" __attribute__((visibility("default")))

WCMI_CONTROL void wcmi_emulation_watch(int64_t begin, int64_t bytes) {
  watched = {static_cast<uintptr_t>(begin), static_cast<uintptr_t>(begin + bytes), 0, 0};
}
WCMI_CONTROL int64_t wcmi_emulation_bytes_read() { return watched.read; }
WCMI_CONTROL int64_t wcmi_emulation_bytes_written() { return watched.written; }

#define WCMI_ACCESS(bytes)                                                       \
  void __tsan_read##bytes(void* p) { count(p, bytes, &watched.read); }           \
  void __tsan_write##bytes(void* p) { count(p, bytes, &watched.written); }       \
  void __tsan_unaligned_read##bytes(void* p) { count(p, bytes, &watched.read); } \
  void __tsan_unaligned_write##bytes(void* p) { count(p, bytes, &watched.written); }

extern "C" {
WCMI_ACCESS(1)
WCMI_ACCESS(2)
WCMI_ACCESS(4)
WCMI_ACCESS(8)
WCMI_ACCESS(16)
void __tsan_read_range(void* p, unsigned long bytes) { count(p, bytes, &watched.read); }
void __tsan_write_range(void* p, unsigned long bytes) { count(p, bytes, &watched.written); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
