// The kernels, compiled once per instruction set with DEFORMND_ISA naming its namespace and
// DEFORMND_BYTES its vector width. No inline function of the standard library is used here: the
// linker keeps one copy of each, perhaps one with instructions that this machine lacks.
//
// Note [layout]
// The image is packed to [image][block][pixel][channel of the block] in the computing type, with
// a border of zeros: one pixel before, one after, and one more after the slowest axis. So a
// sample is one 32-bit pixel index and 2^n weights, without clamping; positions outside point at
// a border cell with weight 0. A block holds channels of one sample group (one offset group and
// one mask group) and one weight group, filled up with zeros to full vectors.
//
// Note [depthwise]
// Where each weight group is one channel in, one channel out, the products would use one lane. So
// a block counts as a weight group, aggregate.h is the forward, and in Reverse scale() and the like
// take the place of the products, or nothing does where there is no weight.
//
// Note [planar], in samples.h, is about samples of at most four channels.
//
// Note [order]
// Columns, the products' inner dimension, are ordered by unit = (block, kernel point), then by
// the channel in the block. Every sum runs in an order that depends on the sizes and the number of
// threads alone, not on which of them is first; on their number only by the parts and bands of
// Reverse.
//
// Note [threads]
// A call is one parallel region, and all threads of the pool take part, also where the work is cut
// for fewer: a region with fewer threads than the last one ends the others, and the next one has
// to start them anew, which takes longer than a small call. No thread owns anything but scratch,
// so a call is right, and the same bit by bit, with however few threads OpenMP grants.
//
// Note [pages]
// Where threads write into a fresh huge page at once, the system clears one for each of them and
// throws away all but one. So each page of a large result is touched by one thread first.

#include <string.h>

#include "core.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX__
#include <immintrin.h>
#endif
#ifdef DEFORMND_SANITIZE
#include <sanitizer/asan_interface.h>
#endif

namespace deformnd {
namespace DEFORMND_ISA {

#include "lanes.h"

template <class T>
struct Machine {
  static constexpr int natural = DEFORMND_BYTES / int(sizeof(T));
  static constexpr int lanes = natural < 4 ? 4 : natural;
#if DEFORMND_BYTES == 64
  static constexpr int rows = 14;  // of a micro-kernel: 14 x 2 vectors of sums in 32 registers
#elif defined(__aarch64__)
  static constexpr int rows = natural < 4 ? 5 : 10;
#else
  static constexpr int rows = natural < 4 ? 3 : 6;  // 6 x 2 in 16 registers
#endif
};

#ifdef DEFORMND_PAIRS
constexpr bool kPairs = true;  // see Note [pairs] in pairs.h
#else
constexpr bool kPairs = false;
#endif
constexpr int kPerWord = kPairs ? 2 : 1;  // numbers in a word of a packed image, or of columns

constexpr i64 kTilePixels = 112;  // 8 micro-kernels of 14 rows: about 256 KB of columns
constexpr i64 kTileWidth = 32;
constexpr i64 kWideTile = 320;  // where coordinates dominate, long rows of offsets
constexpr i64 kStack = 4;       // such tiles, which touch almost the same rows of the image
constexpr i64 kColumns = 576;   // of one product; of pairs in Gather half, for the L1 cache
constexpr i64 kTerms = 144;     // of one sum, see micro_kernel; words of a column for a stack
constexpr i64 kPiece = 512;     // most pixels that a layout change or conversion handles at once
constexpr i64 kRows = 64;       // most pixels of offsets and masks transposed at once
constexpr i32 kFar = 1 << 30;   // of offsets; positions without one are less, see cpu.py
constexpr i64 kSamplesPerThread = 125000;  // of a channel: 20 microseconds, see threads_worth
constexpr i64 kFlightBytes = 32 << 20;     // of packed images at a time, where one is smaller

inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
inline i64 most(i64 a, i64 b) { return a > b ? a : b; }
inline i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 round_up(i64 a, i64 b) { return divide_up(a, b) * b; }
inline i64 gcd(i64 a, i64 b) { return b ? gcd(b, a % b) : a; }
inline i64 lcm(i64 a, i64 b) { return a / gcd(a, b) * b; }

// A thread of those that run a call together.
struct Worker {
  i64 thread, threads;

  // Called by all of them: runs body(task) for all tasks, and returns when all are done.
  template <class Body>
  void share(i64 tasks, const Body& body) const {
#ifdef _OPENMP
    if (threads > 1) {
      // Small tasks by the handful: all threads count on one cell of memory.
      const int handful = int(most(1, tasks / (64 * threads)));
#pragma omp for schedule(dynamic, handful)
      for (i64 task = 0; task < tasks; task++) body(task);
      return;
    }
#endif
    for (i64 task = 0; task < tasks; task++) body(task);
  }

  // The same, but each thread takes tasks that follow one another: where two shares run through the
  // same memory, what a thread writes in the first it finds in its own cache in the second.
  template <class Body>
  void share_in_order(i64 tasks, const Body& body) const {
    for (i64 task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++)
      body(task);
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp barrier
    }
#endif
  }
};

// Run body(worker) on each of the threads, see Note [threads].
template <class Body>
void together([[maybe_unused]] i64 threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
    body(Worker{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  body(Worker{0, 1});
}

// Deals out parts of the workspace; with a null base it only counts.
struct Carver {
  char* base;
  size_t used = 0;
  template <class U>
  U* take(i64 count) {
    U* part = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (size_t(count) * sizeof(U) + 63) / 64 * 64;
#ifdef DEFORMND_SANITIZE
    if (base) __asan_poison_memory_region(base + used, 64);  // until workspace_give
    used += 64;
#endif
    return part;
  }
};

// For Note [pages]: the tasks of `elements` of a result, and one of them.
inline i64 touch_tasks(const Array& a, i64 elements, i64 team) {
  const i64 bytes = elements * (a.dtype == kFloat64 ? 8 : a.dtype == kFloat32 ? 4 : 2);
  return a.data && team > 1 && bytes >= kLarge ? bytes / kHugePage : 0;
}
inline void touch(const Array& a, i64 task) {
  volatile char* page = a.data + task * kHugePage;
  for (i64 at = 0; at < kHugePage; at += 4096) page[at] = 0;
}

// Each builds on those before it.
// clang-format off
#include "convert.h"
#include "products.h"
#include "pairs.h"
#include "samples.h"
#include "plan.h"
#include "cells.h"
#include "aggregate.h"
#include "gather.h"
#include "reverse.h"
#include "attention.h"
// clang-format on

template <class T, int ND>
Status run(const Call& call) {
  if (!call.gather) return Reverse<T, ND>(call).run();
  if constexpr (!kPairs)
    if (call.depthwise) return aggregate<T, ND>(call);
  return gather<T, ND>(call);
}

template <class T>
Status run(const Call& call) {
  return call.rank == 1 ? run<T, 1>(call) : call.rank == 2 ? run<T, 2>(call) : run<T, 3>(call);
}

// In double where any tensor that sets coordinates or values is double.
Status run(const Call& c) {
#ifdef DEFORMND_PAIRS
  return run<float>(c);
#else
  const auto wide = [](const Array& a) { return a.data && a.dtype == kFloat64; };
  return wide(c.image) || wide(c.points) || wide(c.weight) || wide(c.offset) || wide(c.mask)
             ? run<double>(c)
             : run<float>(c);
#endif
}

#ifndef DEFORMND_PAIRS
template <class T>
Status run(const Attention& call) {
  return call.rank == 1   ? attend<T, 1>(call)
         : call.rank == 2 ? attend<T, 2>(call)
                          : attend<T, 3>(call);
}

Status run(const Attention& c) {
  return c.value.dtype == kFloat64 ? run<double>(c) : run<float>(c);
}
#endif

}  // namespace DEFORMND_ISA
}  // namespace deformnd
