// The kernels. This file is compiled once for each instruction set; DEFORMND_ISA is its namespace
// and DEFORMND_BYTES the width of its vectors. No inline function of the standard library is used
// here: the linker keeps one copy of each, and that could be one with instructions that this
// machine lacks.
//
// Note [layout]
// The image is packed to [image][block][pixel][channel of the block] in the computing type, with a
// border of zeros: one pixel before and one after each axis, and one more after the slowest axis.
// So a sample is one 32-bit pixel index and 2^n weights, and nothing has to be clamped; positions
// outside get a cell of the border and weights of 0. A block holds channels of one sample group
// (one offset group and one mask group) and of one weight group, filled up with zeros to full
// vectors.
//
// Note [depthwise]
// Where each weight group has one channel in and one channel out, products would use one lane of a
// vector. So there a block counts as a weight group, the forward is in aggregate.h, and in Reverse
// scale() and add_products() take the place of the products. Without a weight nothing does.
//
// Note [planar], in samples.h, is about samples of at most four channels.
//
// Note [order]
// Columns, the products' inner dimension, are ordered by unit, which is a block and a kernel point,
// and then by the channel in the block. The order of every sum depends on the call's sizes alone,
// and never on which thread comes first. Only the parts and bands of Reverse depend on the number
// of threads as well.
//
// Note [threads]
// A call is one parallel region. All threads of the pool take part in it, even where the work is
// cut for fewer: a region with fewer threads than the last one would end the others, and the next
// region would have to start them anew, which takes longer than a small call. A thread owns nothing
// but scratch, so with however few threads OpenMP grants, the results are the same bit by bit.
//
// Note [pages]
// Where several threads write into a fresh huge page at once, the system clears a page for each of
// them and throws away all but one. So one thread touches each page of a large result first.

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
constexpr i64 kWideTile = 320;  // pixels of a tile's row where coordinates dominate the time
constexpr i64 kStack = 4;       // tiles of a stack, see gather.h
constexpr i64 kColumns = 576;   // columns of a product; half for Gather's pairs, for the L1 cache
constexpr i64 kTerms = 144;     // terms of a sum, see micro_kernel; words of a stack's columns
constexpr i64 kPiece = 512;     // most pixels that a layout change or conversion handles at once
constexpr i64 kRows = 64;       // most pixels of offsets and masks transposed at once
constexpr i32 kFar = 1 << 30;   // an offset so far is outside; positions are less, see cpu.py
constexpr i64 kSamplesPerThread = 125000;  // of one channel: 20 microseconds, see threads_worth
constexpr i64 kFlightBytes = 32 << 20;     // packed images at a time, or else a single one

inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
inline i64 most(i64 a, i64 b) { return a > b ? a : b; }
inline i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 round_up(i64 a, i64 b) { return divide_up(a, b) * b; }
inline i64 gcd(i64 a, i64 b) { return b ? gcd(b, a % b) : a; }
inline i64 lcm(i64 a, i64 b) { return a / gcd(a, b) * b; }

// One of the threads that run a call together.
struct Worker {
  i64 thread, threads;

  // Share the tasks: all threads call this, and it returns when body(task) was run for each task.
  template <class Body>
  void share(i64 tasks, const Body& body) const {
#ifdef _OPENMP
    if (threads > 1) {
      // Small tasks are taken by the handful, since all threads count on one cell of memory.
      const int handful = int(most(1, tasks / (64 * threads)));
#pragma omp for schedule(dynamic, handful)
      for (i64 task = 0; task < tasks; task++) body(task);
      return;
    }
#endif
    for (i64 task = 0; task < tasks; task++) body(task);
  }

  // The same, but each thread takes tasks that follow one another. Where two shares go through the
  // same memory, a thread then finds in its own cache what it wrote in the first.
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

// For Note [pages]: how many tasks it takes to touch the pages of a result, and one of these tasks.
inline i64 touch_tasks(const Array& a, i64 elements, i64 team) {
  const i64 bytes = elements * (a.dtype == kFloat64 ? 8 : a.dtype == kFloat32 ? 4 : 2);
  return a.data && team > 1 && bytes >= kLarge ? bytes / kHugePage : 0;
}
inline void touch(const Array& a, i64 task) {
  volatile char* page = a.data + task * kHugePage;
  for (i64 at = 0; at < kHugePage; at += 4096) page[at] = 0;
}

// Each of these files builds on those before it.
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

// Run a call in double if any tensor that decides about coordinates or values is double.
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
