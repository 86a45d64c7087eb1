// Points from the image where each channel is a group by itself: the forward of deform_aggregate
// and of depthwise deform_conv. Included by kernel.cpp inside the namespace of one instruction set.

// The samples of a tile in one block, and their sums over the kernel points.
template <class T>
struct Aggregation {
  i64 count, kernel, table;  // pixels, kernel points, and the step from one of these to the next
  const T* image;            // the packed block
  const i64* steps;          // from a cell's first corner to each of its corners, in elements
  const i32* index;          // [kernel point][table] first corner of the cell
  const T* weight;           // [kernel point][table][corner] interpolation weight times mask
  const T* scale;            // [kernel point][block] of depthwise deform_conv
  const T* bias;             // [block], or null
  T* to;                     // [count][step]
  i64 step;
};

template <class T>
using Aggregator = void (*)(const Aggregation<T>&);

// A block has NC vectors of N lanes. Several sums are made at a time, since each addition of a
// single sum would wait for the one before.
template <class T, int ND, int N, int NC, bool Scaled>
NOINLINE void aggregate_block(const Aggregation<T>& s) {
  using L = Lanes<T, N>;
  using V = typename L::V;
  constexpr int Q = 1 << ND, Sums = Scaled || NC > 2 ? 1 : Q < 4 / NC ? Q : 4 / NC;
  // Copies, which stay in registers: a store could change what s refers to, so that the compiler
  // would have to load it anew after each.
  const i64 count = s.count, kernel = s.kernel, table = s.table, step = s.step;
  const T* RESTRICT scale = s.scale;
  T* RESTRICT to = s.to;
  const T* corner[Q];
  V start[NC];
  UNROLL
  for (int c = 0; c < Q; c++) corner[c] = s.image + s.steps[c];
  UNROLL
  for (int v = 0; v < NC; v++) start[v] = s.bias ? L::load(s.bias + v * N) : L::zero();
  for (i64 m = 0; m < count; m++, to += step) {
    const i32* RESTRICT index = s.index + m;
    const T* RESTRICT weight = s.weight + m * Q;
    V sums[Sums][NC];
    UNROLL
    for (int v = 0; v < NC; v++) {
      sums[0][v] = start[v];
      UNROLL
      for (int i = 1; i < Sums; i++) sums[i][v] = L::zero();
    }
    for (i64 k = 0; k < kernel; k++, index += table, weight += table * Q) {
      const i64 at = i64(*index) * (N * NC);
      V sample[NC];
      UNROLL
      for (int c = 0; c < Q; c++) {
        const V factor = L::splat(weight[c]);
        UNROLL
        for (int v = 0; v < NC; v++) {
          const V term = factor * L::load(corner[c] + at + v * N);
          if (Scaled)
            sample[v] = c == 0 ? term : sample[v] + term;
          else
            sums[c % Sums][v] = sums[c % Sums][v] + term;
        }
      }
      if (Scaled) {
        UNROLL
        for (int v = 0; v < NC; v++)
          sums[0][v] = sums[0][v] + sample[v] * L::load(scale + (k * NC + v) * N);
      }
    }
    UNROLL
    for (int v = 0; v < NC; v++) {
      UNROLL
      for (int i = 1; i < Sums; i++) sums[0][v] = sums[0][v] + sums[i][v];
      L::store(to + v * N, sums[0][v]);
    }
  }
}

template <class T, int ND, bool Scaled>
Aggregator<T> aggregator_of(int lanes, int vectors) {
  constexpr int N = Machine<T>::lanes;
  if (lanes == N && vectors == 4) return aggregate_block<T, ND, N, 4, Scaled>;
  if (lanes == N && vectors == 2) return aggregate_block<T, ND, N, 2, Scaled>;
  if (lanes == N) return aggregate_block<T, ND, N, 1, Scaled>;
  if constexpr (N > 8)
    if (lanes == 8) return aggregate_block<T, ND, 8, 1, Scaled>;
  return aggregate_block<T, ND, 4, 1, Scaled>;
}

template <class T, int ND>
Status aggregate(const Call& call) {
  using P = Plan<T, ND>;
  P p(call, 4, 1);
  const bool scaled = call.weight.data;
  const Aggregator<T> aggregator = scaled ? aggregator_of<T, ND, true>(p.lanes, p.vectors)
                                          : aggregator_of<T, ND, false>(p.lanes, p.vectors);
  const bool whole = p.run % p.block == 0;
  const bool direct = whole && call.points.last && call.points.dtype == DtypeOf<T>::value;

  // How many images are packed at a time, and, where tiles are too few for the threads, into how
  // many parts the blocks are split.
  const i64 flight =
      least(p.batch, most(kFlightBytes / p.image_bytes(), divide_up(p.threads, p.tiles)));
  const i64 splits = p.share_tiles(flight, p.threads, p.blocks);

  struct Scratch {
    Cells<T, ND> cells;
    T *points, *bias;
    Scratch(Carver& c, const P& p)
        : cells(c, p, p.K, false),
          points(c.take<T>(p.tile_pixels * p.block)),
          bias(c.take<T>(p.block)) {}
  };
  Carver measure{nullptr};
  Scratch(measure, p);
  const i64 scratch_bytes = i64(measure.used);
  const i64 edge_size = most(Field<T>::scratch_size, p.K * p.block);

  T *packed, *weights, *edge;
  T* taints;  // one for each thread, see Cells
  char* scratch;
  const auto layout = [&](Carver c) {
    packed = c.take<T>(flight * p.blocks * p.plane * p.block);
    weights = c.take<T>(scaled ? p.units() * p.block : 0);
    edge = c.take<T>(p.team * edge_size);
    taints = c.take<T>(p.team);
    scratch = c.take<char>(p.team * scratch_bytes);
    return c.used;
  };
  char* memory = workspace_take(layout(Carver{nullptr}));
  if (!memory) return kNoMemory;
  layout(Carver{memory});

  memset(taints, 0, size_t(p.team) * sizeof(T));
  const Field<T> points{call.points, p.point_channels, p.P};
  const i64 pages = touch_tasks(call.points, p.batch * p.point_channels * p.P, p.team);
  together(p.team, [&](const Worker& worker) {
    T* spare = edge + worker.thread * edge_size;
    for (i64 first = 0; first < p.batch; first += flight) {
      const i64 images = least(flight, p.batch - first);
      const i64 once = first == 0 ? pages + (scaled ? p.blocks : 0) : 0;
      if (once > 0)
        worker.share(once, [&](i64 task) {
          if (task < pages) return touch(call.points, task);
          pack_weight_by_channel(p, task - pages, weights, spare);
        });
      const i64 tasks = pack_image_tasks(p, images), lines = tasks / (images * p.blocks);
      // The order of the tasks is that of the tiles in memory, and not that of the blocks.
      worker.share_in_order(tasks, [&](i64 task) {
        const i64 b = task % p.blocks, n = task / p.blocks / lines, line = task / p.blocks % lines;
        pack_image(p, first, (n * p.blocks + b) * lines + line, packed, spare);
      });
      worker.share_in_order(images * p.tiles * splits, [&](i64 task) {
        Carver carver{scratch + worker.thread * scratch_bytes};
        Scratch s(carver, p);
        const i64 split = task % splits, n = task / splits / p.tiles;
        const Tile tile = p.tile(first + n, task / splits % p.tiles);
        s.cells.place(p, tile);
        i64 current = -1;  // the sample group whose cells have been found, if any
        const i64 end = p.blocks * (split + 1) / splits;
        for (i64 b = p.blocks * split / splits; b < end; b++) {
          const i64 sample_group = p.sample_group(b), channel = p.channel(b);
          const i64 count = p.block_channels(b);
          if (sample_group != current) {
            current = sample_group;
            for (i64 k = 0; k < p.K; k++) s.cells.template find<false>(p, tile, sample_group, k, k);
          }
          if (call.bias.data) {
            read(call.bias, channel, count, s.bias);
            for (i64 i = count; i < p.block; i++) s.bias[i] = 0;
          }
          for (i64 i = 0; i < tile.segments; i++) {
            const i64 m = i * tile.length, at = tile.first + i * tile.step;
            T* to =
                direct ? reinterpret_cast<T*>(call.points.data) + points.at(tile.image, channel, at)
                       : s.points;
            const i64 step = direct ? p.point_channels : p.block;
            aggregator({tile.length, p.K, p.table, packed + (n * p.blocks + b) * p.plane * p.block,
                        p.steps, s.cells.index + m, s.cells.weight + m * p.Q,
                        weights + b * p.K * p.block, call.bias.data ? s.bias : nullptr, to, step});
            if (!direct) points.store(tile.image, channel, count, at, tile.length, to, step, spare);
          }
        }
        taints[worker.thread] += s.cells.tainted();
      });
    }
  });
  const Status status = status_of(taints, p.team);
  workspace_give(p.team);
  return status;
}
