// The entry of the library: unpacks a call, picks the instruction set, keeps the workspace.

#include "core.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <initializer_list>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__linux__) && defined(DEFORMND_BFLOAT16)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#include <malloc.h>
#define EXPORT extern "C" __declspec(dllexport)
#elif defined(_WIN32)
#include <malloc.h>
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif
#ifdef DEFORMND_SANITIZE
#include <sanitizer/asan_interface.h>
#endif

namespace deformnd {
namespace {

constexpr size_t kKept = size_t(8) << 20;  // bytes kept between calls for each thread of the call

// Ask for huge pages. Without them fresh memory costs a page fault for every 4 KB, which is a fifth
// of the time of a backward pass whose gradients take 100 MB.
void advise_huge([[maybe_unused]] char* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  const uintptr_t page = kHugePage;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void advise_result(const Array& a, i64 elements) {
  const i64 bytes = elements * (a.dtype == kFloat64 ? 8 : a.dtype == kFloat32 ? 4 : 2);
  if (a.data && bytes >= kLarge) advise_huge(a.data, size_t(bytes));
}

char* allocate(size_t bytes) {
  const size_t alignment = bytes >= size_t(2 * kHugePage) ? size_t(kHugePage) : 64;
  bytes = (bytes + alignment - 1) / alignment * alignment;
#if defined(_WIN32)
  return static_cast<char*>(_aligned_malloc(bytes, alignment));
#else
  void* p = nullptr;
  if (posix_memalign(&p, alignment, bytes)) return nullptr;
  advise_huge(static_cast<char*>(p), bytes);
  return static_cast<char*>(p);
#endif
}

void release(char* p) {
#if defined(_WIN32)
  _aligned_free(p);
#else
  free(p);
#endif
}

struct Workspace {
  char* data = nullptr;
  size_t size = 0;
  void drop() {
#ifdef DEFORMND_SANITIZE
    if (data) __asan_unpoison_memory_region(data, size);
#endif
    release(data);
    data = nullptr, size = 0;
  }
  ~Workspace() { drop(); }
};

thread_local Workspace workspace;

template <class C>
using Run = Status (*)(const C&);

#if defined(DEFORMND_X86) && defined(_MSC_VER)
bool has(int leaf, int reg, int bit) {
  int r[4];
  __cpuidex(r, leaf, 0);
  return r[reg] >> bit & 1;
}
// Whether the operating system saves these registers when it switches between threads.
bool saves(unsigned long long state) {
  return has(1, 2, 27) && (_xgetbv(0) & state) == state;
}
bool has_avx2() { return saves(6) && has(1, 2, 12) && has(1, 2, 29) && has(7, 1, 5); }
bool has_avx512() {
  return has_avx2() && saves(0xe6) && has(7, 1, 16) && has(7, 1, 17) && has(7, 1, 28) &&
         has(7, 1, 30) && has(7, 1, 31);
}
#elif defined(DEFORMND_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif
#if defined(DEFORMND_BFLOAT16)
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// On Intel's processors products of bfloat16 by AVX-512 take longer than those of float32.
bool has_fast_avx512bf16() { return has_avx512bf16() && __builtin_cpu_is("amd"); }
// Linux lets a process use AMX's tiles only after it has asked for that.
bool has_amx() {
#if defined(__linux__)
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d = 0;
  return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 &&
         d >> 24 & 1 && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}
#elif defined(DEFORMND_X86)
bool has_fast_avx512bf16() { return false; }
bool has_amx() { return false; }
#endif

// The highest level of instructions that this machine and build have: 0 is the baseline, 1 AVX2,
// 2 AVX-512, 3 AVX-512 with its products of bfloat16, 4 AMX. A machine with AMX has all the others.
int best_level() {
#if defined(DEFORMND_X86)
  static const int level = has_amx()               ? 4
                           : has_fast_avx512bf16() ? 3
                           : has_avx512()          ? 2
                           : has_avx2()            ? 1
                                                   : 0;
  return level;
#else
  return 0;
#endif
}

// Whether to take the kernels of Note [pairs] in pairs.h, where all products are of bfloat16. With
// few channels and few points those of Note [planar] in samples.h are faster.
[[maybe_unused]] bool in_pairs(const Call& c) {
  const auto has = [](const Array& a, i64 dtype) { return a.data && a.dtype == dtype; };
  const i64 sharing = c.groups > c.offset_groups ? c.groups : c.offset_groups;
  const bool few = c.image_channels <= 4 * sharing && c.point_channels <= 16 * c.groups;
  return !c.depthwise && !few && has(c.weight, kBFloat16) && has(c.points, kBFloat16) &&
         (!c.image.data || has(c.image, kBFloat16)) && !has(c.offset, kFloat64) &&
         !has(c.mask, kFloat64);
}

template <class C>
Run<C> run_of(const C&, i64 level) {
#if defined(DEFORMND_X86)
  if (level >= 2) return avx512::run;
  if (level == 1) return avx2::run;
#endif
  (void)level;
  return baseline::run;
}

#if defined(DEFORMND_BFLOAT16)
Run<Call> run_of(const Call& call, i64 level) {
  return level >= 3 && in_pairs(call) ? bfloat16::run : run_of<Call>(call, level);
}
#endif

// How many calls run at this moment. Each calling thread has a pool of threads of its own. Where
// there are as many callers as a call has threads, the processor is busy with them, and more
// threads would only wait for each other.
std::atomic<i64> calls{0};

// The OpenMP pool does not survive a fork, and two threads would wait for it forever.
std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true, calls = 0; });
#endif

i64 used_level(i64 level) {
  const i64 best = best_level();
  return level < 0 || level > best ? best : level;
}

template <class C>
Status run_counted(C& call, i64 level) {
  call.alone = ++calls >= call.threads || forked;
  const Status status = run_of(call, level)(call);
  --calls;
  return status;
}

// An array from the words that kernels/cpu.py packs.
Array array_of(const i64*& next) {
  Array a;
  a.data = reinterpret_cast<char*>(static_cast<intptr_t>(*next++));
  a.dtype = *next & 3, a.last = *next >> 2 & 1;
  next++;
  return a;
}

}  // namespace

Status dispatch(Call& c, i64 level) {
  c.depthwise = !c.weight.data ||
                (c.groups > 1 && c.groups == c.image_channels && c.groups == c.point_channels);
  i64 image = c.batch * c.image_channels, points = c.batch * c.point_channels, cells = c.batch;
  for (i64 v = 0; v < c.rank; v++)
    image *= c.image_size[v], points *= c.point_size[v], cells *= c.point_size[v] * c.kernel[v];
  if (c.gather) advise_result(c.points, points);
  advise_result(c.grad_image, image);
  advise_result(c.grad_offset, cells * c.offset_groups * c.rank);
  advise_result(c.grad_mask, cells * c.mask_groups);
  const i64 used = used_level(level);
  c.tiles = used >= 4;
  return run_counted(c, used);
}

Status dispatch(Attention& c, i64 level) {
  const i64 channels = c.batch * c.heads * c.channels;
  const i64 samples = c.batch * c.queries * c.heads * c.levels * c.points;
  if (!c.reverse) advise_result(c.output, channels * c.queries);
  advise_result(c.grad_value, channels * c.pixels);
  advise_result(c.grad_locations, samples * c.rank);
  advise_result(c.grad_weights, samples);
  return run_counted(c, used_level(level));
}

char* workspace_take(size_t bytes) {
  if (workspace.size < bytes) {
    workspace.drop();
    workspace.data = allocate(bytes);
    workspace.size = workspace.data ? bytes : 0;
  }
#ifdef DEFORMND_SANITIZE
  if (workspace.data) {
    __asan_unpoison_memory_region(workspace.data, workspace.size);
    memset(workspace.data, 0xff, workspace.size);  // The bits of NaN in every type.
  }
#endif
  return workspace.data;
}

void workspace_give(i64 threads) {
  if (workspace.size > kKept * size_t(threads < 2 ? 2 : threads)) workspace.drop();
}

}  // namespace deformnd

// The version, for kernels/cpu.py, which calls no other than its own.
EXPORT const char* deformnd_version() { return DEFORMND_VERSION; }

// The result of best_level, for kernels/cpu.py.
EXPORT int deformnd_level() { return deformnd::best_level(); }

// Run one call; `words` is what kernels/cpu.py packs. Returns a Status.
EXPORT int deformnd_run(const deformnd::i64* words) {
  using namespace deformnd;
  const i64* next = words;
  const i64 level = *next++;
  Call c;
  c.gather = *next & 1, c.backwards = *next >> 1 & 1;
  next++;
  c.threads = *next++;
  c.exactly = c.threads < 0;
  if (c.exactly) c.threads = -c.threads;
  c.rank = *next++;
  for (i64* size : {&c.batch, &c.image_channels, &c.point_channels, &c.groups, &c.offset_groups,
                    &c.mask_groups})
    *size = *next++;
  for (i64* sizes : {c.image_size, c.point_size, c.kernel, c.stride, c.padding, c.dilation})
    for (i64 v = 0; v < c.rank; v++) sizes[v] = *next++;
  for (Array* a : {&c.image, &c.points, &c.weight, &c.offset, &c.mask, &c.bias, &c.grad_image,
                   &c.grad_weight, &c.grad_offset, &c.grad_mask})
    *a = array_of(next);
  return static_cast<int>(dispatch(c, level));
}

// Run one call of deform_attention, in the same way.
EXPORT int deformnd_attend(const deformnd::i64* words) {
  using namespace deformnd;
  const i64* next = words;
  const i64 level = *next++;
  Attention c;
  c.reverse = *next++ != 0;
  c.threads = *next++;
  c.exactly = c.threads < 0;
  if (c.exactly) c.threads = -c.threads;
  for (i64* size :
       {&c.rank, &c.batch, &c.queries, &c.heads, &c.channels, &c.levels, &c.points, &c.pixels})
    *size = *next++;
  for (Array* a : {&c.value, &c.locations, &c.weights, &c.output, &c.grad_value, &c.grad_locations,
                   &c.grad_weights})
    *a = array_of(next);
  c.sizes = next;
  return static_cast<int>(dispatch(c, level));
}
