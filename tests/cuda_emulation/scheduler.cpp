// Schedules the fibres. Compiled without sanitizers, which are told by hand of the stacks and of
// the order between threads: WCMI_ASAN or WCMI_TSAN is defined where the kernels are under one.
#include "scheduler.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sanitizers.h"

namespace wcmi_emulation {

__thread const Place* place __attribute__((tls_model("initial-exec")));

namespace {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr uint64_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535, kMaxBlockZ = 64;
constexpr size_t kMaxShared = 48 * 1024, kRedZone = 128, kArenaBytes = 2 * kMaxShared;
constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = (kAddressSanitizer || kThreadSanitizer ? 256 : 64) * 1024;
// ThreadSanitizer sees no race between two threads on one fibre: so many get one each.
constexpr size_t kOwnFibres = kThreadSanitizer ? 2048 : 0;
constexpr size_t kMaxStacks = 2048;
constexpr int kMaxSharedArrays = 32;

// ---- settings and outcome -----------------------------------------------------------------------

int64_t from_environment(const char* name, int64_t otherwise) {
  const char* text = getenv(name);
  return text == nullptr ? otherwise : atoll(text);
}

struct Settings {
  int64_t seed = from_environment("WCMI_EMULATION_SEED", 0);
  int64_t os_threads = from_environment("WCMI_EMULATION_THREADS", 1);
  int64_t first_block = 0, block_count = -1;
} settings;

struct Outcome {
  std::mutex mutex;
  std::string text;
  cudaError_t unread = cudaSuccess;
  std::atomic<bool> failed{false};
  int64_t launches = 0, last_stream = 0, last_device = 0;
} outcome;

__thread int device __attribute__((tls_model("initial-exec")));

void report(const std::string& text, cudaError_t error) {
  const std::lock_guard<std::mutex> guard(outcome.mutex);
  if (outcome.failed.exchange(true)) return;
  outcome.text = text;
  outcome.unread = error;
}

std::string text_of(const Site& site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

std::string text_of(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string hexadecimal(unsigned mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

// SplitMix64.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t x = (state += 0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  uint64_t below(uint64_t bound) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(next()) * bound >> 64);
  }
};

// ---- fibres -------------------------------------------------------------------------------------

// Saves the registers that a call keeps, writes the stack's end to *save and goes on where the
// stack that ends at `to` did the same.
extern "C" void wcmi_switch_stack(void** save, void* to) __attribute__((visibility("hidden")));
asm(R"(
  .text
  .hidden wcmi_switch_stack
  .globl wcmi_switch_stack
  .type wcmi_switch_stack, @function
wcmi_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size wcmi_switch_stack, .-wcmi_switch_stack
)");

struct Stack {
  char* base = nullptr;
  size_t bytes = 0;
  void* tsan_fibre = nullptr;
};

// Below the stack lies a page that cannot be written.
Stack new_stack() {
  void* memory = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
    perror("CUDA emulation: no memory for a stack");
    abort();
  }
  return {static_cast<char*>(memory) + kPage, kStackBytes, __tsan_create_fiber(0)};
}

// Lays out the end of an unused stack as wcmi_switch_stack leaves one: six registers, then where to
// go on. The ends lie apart by other than pages, or all would compete for few lines of the cache.
void* unused_stack_end(const Stack& stack, int colour, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(stack.base + stack.bytes - 64 - colour % 16 * 192) - 8;
  std::fill(frame, frame + 8, nullptr);
  frame[6] = reinterpret_cast<void*>(entry);
  return frame;
}

void switch_to(const Stack& stack, void* end, void** save, bool for_ever) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake_stack, stack.base, stack.bytes);
  __tsan_switch_to_fiber(stack.tsan_fibre, kSwitchOrdersNothing);
  wcmi_switch_stack(save, end);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// ---- the order between threads, for ThreadSanitizer ---------------------------------------------

constexpr int kMasks = 8;

// Two tags for each barrier, used in turn: a thread may be at the next one before another has left.
// Each block has its own, or it would be ordered after earlier blocks.
struct BlockTags {
  uint64_t barrier[2], warp[kMaxWarps][kMasks][2];
};
constexpr size_t kTaggedBlocks = kThreadSanitizer ? 16384 : 1;

struct Tags {
  BlockTags* blocks = nullptr;
  size_t used = 0;
  uint64_t launch_begins, launch_ends, fence;

  void begin_launch() {
    const size_t bytes = kTaggedBlocks * sizeof(BlockTags);
    if (blocks != nullptr) munmap(blocks, bytes);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    blocks = static_cast<BlockTags*>(memory);
  }
  BlockTags* next_block() { return &blocks[used++ % kTaggedBlocks]; }
};

// ---- one OS thread's fibres ---------------------------------------------------------------------

enum class State { kNew, kRuns, kWaits, kGone };

struct Wait {
  const char* operation;
  Site site;
  WarpOperation kind;
  unsigned mask;
  uint64_t value;
  int source;
};

struct Thread {
  Place place;
  int index = 0;
  State state = State::kNew;
  Stack* stack = nullptr;
  void* stack_end = nullptr;
  Wait wait = {};
  uint64_t answer = 0;

  int lane() const { return index % 32; }
  std::string name() const { return "thread " + text_of(place.thread); }
  std::string waits() const {
    const std::string lanes = wait.mask == 0 ? "" : " for lanes " + hexadecimal(wait.mask);
    return name() + " waits in " + wait.operation + " at " + text_of(wait.site) + lanes;
  }
};

struct Warp {
  unsigned live, waiting;
  unsigned masks[kMasks];
  unsigned char phases[kMasks];
};

struct SharedArray {
  const void* key;
  void* address;
};

class Worker {
 public:
  Worker();
  void begin_launch(const Launch* launch);
  void run_block(uint64_t block);
  void end_launch() { __tsan_acquire(&tags_.launch_ends); }

  int barrier(bool predicate, const char* operation, Site site);
  uint64_t warp(const Wait& wait);
  void* shared_array(const void* key, size_t bytes, size_t alignment, Site site);
  void* dynamic_shared() { return arena_; }
  void memory_fence();
  int lane() const { return running_->lane(); }
  const Thread& running() const { return *running_; }
  [[noreturn]] void fail(const std::string& what);
  [[noreturn]] void run_threads();

 private:
  void lay_out_shared();
  void make_ready(Thread* thread);
  Thread* choose();
  void begin(Thread* thread, Stack* stack);
  void go_to(Thread* next, void** save, bool for_ever);
  void give_way();
  [[noreturn]] void go_home();
  void add_stack();
  Stack* take_stack();
  void give_back(Stack* stack);
  void give_back_all();
  void leave_kernel(Thread* thread);
  unsigned ready_lanes(int warp, const Wait& wait) const;
  void answer(int warp, unsigned lanes, const Wait& wait);
  int mask_slot(int warp, unsigned mask);
  uint64_t* warp_tag(int warp, unsigned mask);
  std::string deadlock() const;

  const Launch* launch_ = nullptr;
  bool shuffled_ = false;
  Random random_ = {0};
  int count_ = 0;
  std::array<Thread, kMaxThreads> threads_;
  std::array<Warp, kMaxWarps> warps_;
  Thread* running_ = nullptr;

  std::array<Thread*, kMaxThreads> ready_;
  int ready_first_ = 0, ready_count_ = 0;
  std::array<short, kMaxThreads> order_;
  int begun_ = 0, gone_ = 0;

  const Thread* first_at_barrier_ = nullptr;
  int at_barrier_ = 0, predicates_ = 0, barrier_answer_ = 0, barrier_phase_ = 0;

  // Of a fixed size: under ThreadSanitizer a fibre that frees memory would race with who wrote it.
  std::array<Stack, kMaxStacks> stacks_;
  std::array<Stack*, kMaxStacks> free_;
  size_t stack_count_ = 0, first_free_ = 0, free_count_ = 0;
  Stack home_;
  void* home_end_ = nullptr;

  char* arena_ = nullptr;
  size_t arena_used_ = 0, shared_bytes_ = 0;
  std::array<SharedArray, kMaxSharedArrays> shared_;
  int shared_count_ = 0;
  Tags tags_ = {};
  BlockTags* block_tags_ = nullptr;
};

__thread Worker* worker __attribute__((tls_model("initial-exec")));

void run_fibre() { worker->run_threads(); }

Worker::Worker() {
  for (int i = 0; i < kMaxThreads; ++i) threads_[i].index = i;
  void* memory =
      mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  arena_ = static_cast<char*>(memory);
}

void Worker::begin_launch(const Launch* launch) {
  launch_ = launch;
  shuffled_ = settings.seed != 0;
  const uint3 block = launch->block;
  count_ = static_cast<int>(block.x * block.y * block.z);
  for (int i = 0; i < count_; ++i) {
    const unsigned t = static_cast<unsigned>(i);
    const uint3 thread = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
    threads_[i].place = {thread, {0, 0, 0}, block, launch->grid};
  }
  home_ = {nullptr, 0, __tsan_get_current_fiber()};
  // Here, since a fibre that another fibre creates is ordered after it.
  const dim3 grid = launch->grid;
  const uint64_t threads =
      static_cast<uint64_t>(grid.x) * grid.y * grid.z * static_cast<unsigned>(count_);
  while (stack_count_ < std::min<uint64_t>(kOwnFibres, threads)) add_stack();
  if (kThreadSanitizer || tags_.blocks == nullptr) tags_.begin_launch();
}

void Worker::run_block(uint64_t block) {
  const dim3 grid = launch_->grid;
  const uint3 index = {static_cast<unsigned>(block % grid.x),
                       static_cast<unsigned>(block / grid.x % grid.y),
                       static_cast<unsigned>(block / grid.x / grid.y)};
  random_.state = static_cast<uint64_t>(settings.seed) * 0x2545f4914f6cdd1d + block;
  for (int i = 0; i < count_; ++i) {
    threads_[i].place.block = index;
    threads_[i].state = State::kNew;
    order_[i] = static_cast<short>(i);
    if (shuffled_) std::swap(order_[i], order_[random_.below(static_cast<uint64_t>(i) + 1)]);
  }
  for (int w = 0; w * 32 < count_; ++w) {
    const int lanes = std::min(32, count_ - w * 32);
    warps_[w] = {lanes == 32 ? ~0u : (1u << lanes) - 1, 0, {}, {}};
  }
  ready_first_ = ready_count_ = begun_ = gone_ = 0;
  at_barrier_ = predicates_ = barrier_phase_ = 0;
  lay_out_shared();
  block_tags_ = tags_.next_block();
  __tsan_release(&tags_.launch_begins);
  running_ = nullptr;
  Thread* const first = choose();
  begin(first, take_stack());
  go_to(first, &home_end_, false);
  place = nullptr;
  if (gone_ < count_) give_back_all();
}

void Worker::add_stack() {
  stacks_[stack_count_] = new_stack();
  give_back(&stacks_[stack_count_++]);
}

Stack* Worker::take_stack() {
  if (free_count_ == 0) add_stack();
  Stack* const stack = free_[first_free_];
  first_free_ = (first_free_ + 1) % kMaxStacks;
  --free_count_;
  return stack;
}

void Worker::give_back(Stack* stack) { free_[(first_free_ + free_count_++) % kMaxStacks] = stack; }

// Ends what runs on each stack, wherever it is.
void Worker::give_back_all() {
  free_count_ = 0;
  for (size_t i = 0; i < stack_count_; ++i) {
    __asan_unpoison_memory_region(stacks_[i].base, stacks_[i].bytes);
    __tsan_switch_to_fiber(stacks_[i].tsan_fibre, kSwitchOrdersNothing);
    __tsan_release(&tags_.launch_ends);
    give_back(&stacks_[i]);
  }
  __tsan_switch_to_fiber(home_.tsan_fibre, kSwitchOrdersNothing);
}

void Worker::make_ready(Thread* thread) {
  ready_[(ready_first_ + ready_count_++) % kMaxThreads] = thread;
}

// Prefers threads that have begun: a warp goes on before the next one begins. With a seed every
// thread that can run is as likely as any other.
Thread* Worker::choose() {
  const int unbegun = count_ - begun_;
  if (ready_count_ + unbegun == 0) return nullptr;
  int picked = 0;
  if (shuffled_ && ready_count_ > 0) {
    picked = static_cast<int>(random_.below(static_cast<uint64_t>(ready_count_ + unbegun)));
  }
  if (picked >= ready_count_) return &threads_[order_[begun_++]];
  Thread*& first = ready_[ready_first_];
  std::swap(first, ready_[(ready_first_ + picked) % kMaxThreads]);
  ready_first_ = (ready_first_ + 1) % kMaxThreads;
  --ready_count_;
  return first;
}

void Worker::begin(Thread* thread, Stack* stack) {
  thread->stack = stack;
  thread->stack_end = unused_stack_end(*stack, thread->index, &run_fibre);
}

// Returns when someone goes on with what is saved.
void Worker::go_to(Thread* next, void** save, bool for_ever) {
  next->state = State::kRuns;
  running_ = next;
  place = &next->place;
  switch_to(*next->stack, next->stack_end, save, for_ever);
}

void Worker::give_way() {
  Thread* const self = running_;
  self->state = State::kWaits;
  Thread* const next = choose();
  if (next == nullptr) fail(deadlock());
  if (next->state == State::kNew) begin(next, take_stack());
  if (next != self) go_to(next, &self->stack_end, false);
  self->state = State::kRuns;
}

void Worker::go_home() {
  void* nowhere;
  switch_to(home_, home_end_, &nowhere, true);
  __builtin_unreachable();
}

// Runs one thread after the other while none that has begun can go on, so that a block without
// barriers needs one stack. Under ThreadSanitizer each thread has its own fibre.
void Worker::run_threads() {
  const void* bottom = home_.base;
  __sanitizer_finish_switch_fiber(nullptr, home_.base == nullptr ? &bottom : nullptr,
                                  home_.base == nullptr ? &home_.bytes : nullptr);
  home_.base = static_cast<char*>(const_cast<void*>(bottom));
  for (;;) {
    Thread* const self = running_;
    __tsan_acquire(&tags_.launch_begins);
    launch_->run_thread(launch_->arguments);
    __tsan_release(&tags_.launch_ends);
    leave_kernel(self);
    Thread* const next = choose();
    if (next == nullptr && gone_ < count_) fail(deadlock());
    if (next != nullptr && next->state == State::kNew) {
      if (!kThreadSanitizer) {
        next->stack = self->stack;
        next->state = State::kRuns;
        running_ = next;
        place = &next->place;
        continue;
      }
      begin(next, take_stack());
    }
    give_back(self->stack);
    if (next == nullptr) go_home();
    void* nowhere;
    go_to(next, &nowhere, true);
  }
}

void Worker::leave_kernel(Thread* thread) {
  thread->state = State::kGone;
  ++gone_;
  if (at_barrier_ > 0) {
    fail("divergent barrier: " + first_at_barrier_->waits() + " while " + thread->name() +
         " has left the kernel");
  }
  const int w = thread->index / 32;
  warps_[w].live &= ~(1u << thread->lane());
  for (int lane = 0; lane < 32; ++lane) {
    if ((warps_[w].waiting >> lane & 1) == 0) continue;
    const Wait& wait = threads_[w * 32 + lane].wait;
    const unsigned lanes = ready_lanes(w, wait);
    if (lanes != 0) answer(w, lanes, wait);
  }
}

void Worker::fail(const std::string& what) {
  report(std::string(launch_->kernel) + ", block " + text_of(running_->place.block) + ": " + what,
         cudaErrorLaunchFailure);
  go_home();
}

// ---- barriers and warps -------------------------------------------------------------------------

int Worker::barrier(bool predicate, const char* operation, Site site) {
  Thread* const self = running_;
  self->wait = {operation, site, WarpOperation::kSync, 0, 0, 0};
  if (gone_ > 0)
    fail("divergent barrier: " + self->waits() + " after a thread has left the kernel");
  if (at_barrier_ == 0) first_at_barrier_ = self;
  if (!same(first_at_barrier_->wait.site, site)) {
    fail("divergent barrier: " + first_at_barrier_->waits() + " while " + self->waits());
  }
  uint64_t* const tag = &block_tags_->barrier[barrier_phase_];
  __tsan_release(tag);
  predicates_ += predicate;
  if (++at_barrier_ == count_) {
    barrier_answer_ = predicates_;
    barrier_phase_ ^= 1;
    at_barrier_ = predicates_ = 0;
    for (int i = 0; i < count_; ++i) {
      if (shuffled_ || &threads_[i] != self) make_ready(&threads_[i]);
    }
    if (shuffled_) give_way();
  } else {
    give_way();
  }
  __tsan_acquire(tag);
  return barrier_answer_;
}

uint64_t Worker::warp(const Wait& wait) {
  Thread* const self = running_;
  const int w = self->index / 32;
  self->wait = wait;
  if ((wait.mask >> self->lane() & 1) == 0) {
    fail(self->waits() + ", which do not include its own lane " + std::to_string(self->lane()));
  }
  warps_[w].waiting |= 1u << self->lane();
  uint64_t* tag = nullptr;
  if (kThreadSanitizer && wait.kind == WarpOperation::kSync) {
    tag = warp_tag(w, wait.mask);
    __tsan_release(tag);
  }
  const unsigned lanes = ready_lanes(w, wait);
  if (lanes != 0) answer(w, lanes, wait);
  if (lanes == 0 || shuffled_) give_way();
  if (tag != nullptr) __tsan_acquire(tag);
  return self->answer;
}

// The lanes of the mask, if all that have not left the kernel wait in the same operation, else 0.
unsigned Worker::ready_lanes(int w, const Wait& wait) const {
  const unsigned lanes = wait.mask & warps_[w].live;
  if ((lanes & ~warps_[w].waiting) != 0) return 0;
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    const Wait& other = threads_[w * 32 + __builtin_ctz(left)].wait;
    if (other.mask != wait.mask || other.operation != wait.operation) return 0;
  }
  return lanes;
}

void Worker::answer(int w, unsigned lanes, const Wait& wait) {
  Thread* const warp = &threads_[w * 32];
  unsigned ballot = 0;
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    ballot |= (warp[lane].wait.value != 0 ? 1u : 0u) << lane;
  }
  for (unsigned left = lanes; left != 0; left &= left - 1) {
    Thread& thread = warp[__builtin_ctz(left)];
    const int source = thread.wait.source;
    if (wait.kind == WarpOperation::kShuffle && (lanes >> source & 1) == 0) {
      fail(thread.waits() + " and reads lane " + std::to_string(source) +
           ((wait.mask >> source & 1) == 0 ? ", which is not among them" : ", which is not there"));
    }
    thread.answer = wait.kind == WarpOperation::kBallot ? ballot : warp[source].wait.value;
    if (shuffled_ || &thread != running_) make_ready(&thread);
  }
  warps_[w].waiting &= ~lanes;
  if (kThreadSanitizer) warps_[w].phases[mask_slot(w, wait.mask)] ^= 1;
}

// Lanes that meet under one mask are ordered with each other only. Masks beyond kMasks share a
// slot.
int Worker::mask_slot(int w, unsigned mask) {
  unsigned* const masks = warps_[w].masks;
  int slot = 0;
  while (slot < kMasks - 1 && masks[slot] != mask && masks[slot] != 0) ++slot;
  masks[slot] = mask;
  return slot;
}

uint64_t* Worker::warp_tag(int w, unsigned mask) {
  const int slot = mask_slot(w, mask);
  return &block_tags_->warp[w][slot][warps_[w].phases[slot]];
}

std::string Worker::deadlock() const {
  const auto waits = [](const Thread& t) { return t.state == State::kWaits; };
  const Thread* const end = threads_.data() + count_;
  const Thread* const first = std::find_if(threads_.data(), end, waits);
  const Thread* const second = std::find_if(first, end, [&](const Thread& t) {
    return waits(t) && (!same(t.wait.site, first->wait.site) || t.wait.mask != first->wait.mask);
  });
  return "deadlock: " + first->waits() + (second == end ? "" : " while " + second->waits());
}

// ---- shared memory ------------------------------------------------------------------------------

// Fills what a block may use with NaN: what it reads before it writes shows in its results.
void Worker::lay_out_shared() {
  if (kThreadSanitizer) {
    // A new mapping has no history: else this block would seem to race with the last one.
    mmap(arena_, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
         0);
  }
  __asan_poison_memory_region(arena_, kArenaBytes);
  shared_count_ = 0;
  shared_bytes_ = launch_->dynamic_shared;
  arena_used_ = shared_bytes_ + kRedZone;
  __asan_unpoison_memory_region(arena_, shared_bytes_);
  memset(arena_, 0xff, kThreadSanitizer ? kArenaBytes : shared_bytes_);
}

void* Worker::shared_array(const void* key, size_t bytes, size_t alignment, Site site) {
  for (int i = 0; i < shared_count_; ++i) {
    if (shared_[i].key == key) return shared_[i].address;
  }
  if (shared_count_ == kMaxSharedArrays) fail("it has more than 32 shared arrays");
  shared_bytes_ += bytes;
  if (shared_bytes_ > kMaxShared) {
    fail("the shared array at " + text_of(site) + " makes it " + std::to_string(shared_bytes_) +
         " bytes of shared memory, wanted at most " + std::to_string(kMaxShared));
  }
  // No better aligned than its type: vector accesses to it must not count on more.
  arena_used_ = (arena_used_ + 127) / 128 * 128 + alignment % 128;
  char* const address = arena_ + arena_used_;
  arena_used_ += bytes + kRedZone;
  __asan_unpoison_memory_region(address, bytes);
  if (!kThreadSanitizer) memset(address, 0xff, bytes);
  shared_[shared_count_++] = {key, address};
  return address;
}

void Worker::memory_fence() {
  __tsan_release(&tags_.fence);
  __tsan_acquire(&tags_.fence);
}

// ---- launches -----------------------------------------------------------------------------------

std::string what_is_wrong_with(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || block.z > kMaxBlockZ) {
    return "block is " + text_of(block) + ", wanted 1 to 1024 threads, at most 64 of them along z";
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ) {
    return "grid is " + text_of(grid) + ", wanted 1 to (2147483647, 65535, 65535)";
  }
  if (launch.dynamic_shared > kMaxShared) {
    return "shared memory is " + std::to_string(launch.dynamic_shared) + " bytes, wanted at most " +
           std::to_string(kMaxShared);
  }
  return "";
}

struct Selection {
  uint64_t first, count, step, start;
  uint64_t block(uint64_t i) const {
    return first +
           static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + start) % count);
  }
};

// The blocks that run, in an order that depends on the seed.
Selection select_blocks(const dim3& grid) {
  const int64_t total = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  const int64_t asked = settings.first_block;
  const int64_t first = std::clamp<int64_t>(asked < 0 ? total + asked : asked, 0, total);
  const int64_t rest = total - first;
  const int64_t wanted = settings.block_count < 0 ? rest : std::min(rest, settings.block_count);
  const uint64_t count = static_cast<uint64_t>(wanted);
  Selection selection = {static_cast<uint64_t>(first), count, 1, 0};
  if (settings.seed == 0 || count < 2) return selection;
  Random random = {static_cast<uint64_t>(settings.seed)};
  selection.start = random.below(count);
  do {
    selection.step = random.below(count);
  } while (std::gcd(selection.step, count) != 1);
  return selection;
}

void run_blocks(Worker* own, const Launch& launch, const Selection& blocks,
                std::atomic<uint64_t>* next) {
  worker = own;
  own->begin_launch(&launch);
  for (uint64_t i = (*next)++; i < blocks.count && !outcome.failed; i = (*next)++) {
    own->run_block(blocks.block(i));
  }
  own->end_launch();
  worker = nullptr;
}

// Kept from launch to launch for their stacks.
std::vector<std::unique_ptr<Worker>> workers;

}  // namespace

void launch(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  // As on a GPU, a program that does not look at an error gets no further.
  if (outcome.unread != cudaSuccess) return;
  outcome.failed = false;
  outcome.text.clear();
  ++outcome.launches;
  outcome.last_stream = reinterpret_cast<int64_t>(launch.stream);
  outcome.last_device = device;
  const std::string wrong = what_is_wrong_with(launch);
  if (!wrong.empty()) {
    return report(std::string(launch.kernel) + ": " + wrong, cudaErrorInvalidConfiguration);
  }
  const Selection blocks = select_blocks(launch.grid);
  const int64_t most = kThreadSanitizer ? 1 : settings.os_threads;
  const size_t used = static_cast<size_t>(
      std::clamp<int64_t>(most, 1, std::max<int64_t>(1, static_cast<int64_t>(blocks.count))));
  while (workers.size() < used) workers.push_back(std::make_unique<Worker>());
  std::atomic<uint64_t> next{0};
  std::vector<std::thread> helpers;
  for (size_t i = 1; i < used; ++i) {
    helpers.emplace_back(run_blocks, workers[i].get(), std::cref(launch), std::cref(blocks), &next);
  }
  run_blocks(workers[0].get(), launch, blocks, &next);
  for (std::thread& helper : helpers) helper.join();
}

int barrier(bool predicate, const char* operation, Site site) {
  return worker->barrier(predicate, operation, site);
}

uint64_t warp(WarpOperation operation, const char* name, unsigned mask, uint64_t value, int source,
              Site site) {
  return worker->warp({name, site, operation, mask, value, source});
}

int lane() { return worker->lane(); }

void fail(const char* what, Site site) {
  worker->fail(worker->running().name() + " at " + text_of(site) + ": " + what);
}

void* shared_array(const void* key, size_t bytes, size_t alignment, Site site) {
  return worker->shared_array(key, bytes, alignment, site);
}

void* dynamic_shared() { return worker->dynamic_shared(); }

void memory_fence() { worker->memory_fence(); }

}  // namespace wcmi_emulation

// ---- undefined behaviour ------------------------------------------------------------------------

// What kernels built with -fsanitize=alignment,bounds call, where no library of the compiler's
// does.
#ifndef WCMI_ASAN
namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void fail_at(const SourceLocation& location, const char* what) {
  wcmi_emulation::fail(what, {location.file, static_cast<int>(location.line)});
}

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(const SourceLocation* location, const void*) {
  fail_at(*location, "the address is not aligned as its type wants");
}

extern "C" void __ubsan_handle_out_of_bounds(const SourceLocation* location, const void*) {
  fail_at(*location, "the index is outside of the array");
}
#endif

// ---- CUDA's runtime and the tests' controls -----------------------------------------------------

using wcmi_emulation::outcome;
using wcmi_emulation::settings;

constexpr int kDevices = 2, kMultiprocessors = 4;

cudaError_t cudaGetDevice(int* device) {
  *device = wcmi_emulation::device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  wcmi_emulation::device = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(outcome.unread, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return outcome.unread; }

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  const bool ours = error == cudaErrorLaunchFailure || error == cudaErrorInvalidConfiguration;
  return ours ? outcome.text.c_str() : "an error of the emulated CUDA runtime";
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t count, cudaStream_t) {
  memset(address, value, count);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool fits = attribute != cudaFuncAttributeMaxDynamicSharedMemorySize ||
                    value <= static_cast<int>(wcmi_emulation::kMaxShared);
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = wcmi_emulation::kMaxThreads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(wcmi_emulation::kMaxShared);
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

#define WCMI_CONTROL extern "C" __attribute__((visibility("default")))

WCMI_CONTROL const char* wcmi_emulation_error() { return outcome.text.c_str(); }

WCMI_CONTROL void wcmi_emulation_set_seed(int64_t seed) { settings.seed = seed; }

WCMI_CONTROL void wcmi_emulation_set_os_threads(int64_t threads) { settings.os_threads = threads; }

// Of every launch only `count` blocks from `first` on run; a negative `first` counts from the end,
// a negative `count` means all the rest.
WCMI_CONTROL void wcmi_emulation_only_blocks(int64_t first, int64_t count) {
  settings.first_block = first;
  settings.block_count = count;
}

WCMI_CONTROL int64_t wcmi_emulation_launches() { return outcome.launches; }

WCMI_CONTROL int64_t wcmi_emulation_last_stream() { return outcome.last_stream; }

WCMI_CONTROL int64_t wcmi_emulation_last_device() { return outcome.last_device; }
