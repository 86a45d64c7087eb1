// Multi-scale deformable attention: deform_attention and its gradients.
// Included by kernel.cpp inside the namespace of one instruction set.
//
// Note [attention]
// Nothing is packed. Channels are last in the value, so a corner of a sample is a row of its head's
// channels; a corner outside is a row of zeros beside the value. Threads share the queries, and
// each computes the gradients of its queries' locations and weights. While the samples of one head
// are summed up, the pixels of the next head's samples are fetched into the cache.
// Every query adds to the value's gradient. So for that gradient each thread owns heads of an
// image, goes through all queries, and adds in a copy of its own. Where there are too few heads, it
// owns some channels of a head, or a band of the pixels. Each sum runs in the order of the queries,
// so no gradient depends on the number of threads.

constexpr i64 kQueries = 16;  // that a thread takes at a time

// Where the samples of one query and head lie, those of all levels side by side in vectors.
template <class T, int ND>
struct Corners {
  static constexpr int N = Machine<T>::lanes, Q = 1 << ND;
  using L = Lanes<T, N>;
  using V = typename L::V;
  using I = typename L::I;
  using M = typename L::M;

  const Attention& call;
  i64 count, table;  // the number of samples, and how many there is room for
  // For each sample, numbers of its level.
  T* scale;              // [axis][table] size
  i32 *size, *step;      // [axis][table] size, and pixels from one to the next
  i32* start;            // [table] first pixel
  T* given;              // [table * ND] locations, converted if they are of another type
  T *position, *weight;  // [axis][table], [table]
  T* fraction;           // [axis][table]
  i32* index;            // [corner][table] pixel, or -1 for one outside
  T* factor;             // [corner][table] interpolation weight times weight
  i64* offset;           // [corner][table] from the head's first row to that of the corner
  V taint;               // see Cells

  Corners(Carver& carver, const Attention& c) : call(c) {
    count = c.levels * c.points, table = round_up(count, N);
    scale = carver.take<T>(ND * table);
    size = carver.take<i32>(ND * table);
    step = carver.take<i32>(ND * table);
    start = carver.take<i32>(table);
    given = carver.take<T>(ND * table);
    position = carver.take<T>(ND * table);
    weight = carver.take<T>(table);
    fraction = carver.take<T>(ND * table);
    index = carver.take<i32>(Q * table);
    factor = carver.take<T>(Q * table);
    offset = carver.take<i64>(Q * table);
    taint = L::zero();
  }

  void prepare() {
    i64 first = 0, i = 0;
    for (i64 level = 0; level < call.levels; level++) {
      const i64* sizes = call.sizes + level * ND;
      i64 steps[ND], pixels = 1;
      for (int v = ND - 1; v >= 0; v--) steps[v] = pixels, pixels *= sizes[v];
      for (i64 point = 0; point < call.points; point++, i++) {
        start[i] = i32(first);
        for (int v = 0; v < ND; v++) {
          scale[v * table + i] = T(sizes[v]);
          size[v * table + i] = i32(sizes[v]), step[v * table + i] = i32(steps[v]);
        }
      }
      first += pixels;
    }
    for (; i < table; i++) {  // What fills up the last vector lies outside.
      start[i] = 0, weight[i] = 0;
      for (int v = 0; v < ND; v++) {
        position[v * table + i] = -2;
        scale[v * table + i] = 0, size[v * table + i] = 0, step[v * table + i] = 0;
      }
    }
  }

  // `row` is an index into [batch][query][head].
  void find(i64 row) {
    const T* location = view(call.locations, row * count * ND, count * ND, given);
    read(call.weights, row * count, count, weight);
    for (int v = 0; v < ND; v++)  // Locations have x first, which is the last axis.
      for (i64 i = 0; i < count; i++)
        position[v * table + i] = location[i * ND + ND - 1 - v] * scale[v * table + i];
#if defined(__GNUC__)
    // The product must be rounded before the half is taken off, as in the reference. A fused
    // multiply-add would now and then put a sample at a pixel's centre into another cell.
    asm volatile("" ::: "memory");
#endif
    for (i64 i = 0; i < table; i += N) {
      I pixel[Q], within[Q];
      V product[Q];
      const V given_weight = L::load(weight + i);
      const V outside = given_weight * L::zero();
      taint = taint + outside;
      I cell[ND], low[ND], high[ND];
      V part[ND];
      M near = L::splat(0) < L::splat(1);
      UNROLL
      for (int v = 0; v < ND; v++) {
        const V at = L::load(position + v * table + i) - L::splat(T(0.5));
        const M fits = (at >= L::splat(-1)) & (at < L::splat(kFar));
        // What does not fit becomes 0, since its conversion to an integer would be undefined.
        const V safe = L::select(fits, at, L::zero()), floor = L::floor(safe);
        cell[v] = L::to_index(floor), part[v] = safe - floor;
        near = near & fits;
        L::store(fraction + v * table + i, part[v]);
      }
      UNROLL
      for (int v = 0; v < ND; v++) {
        const I extent = L::load_index(size + v * table + i);
        near = near & L::mask(cell[v] < extent);
      }
      const I far = L::splat_index(-1);
      UNROLL
      for (int v = 0; v < ND; v++) {
        // A cell outside has no corner inside; its own index could overflow.
        const I extent = L::load_index(size + v * table + i);
        cell[v] = L::select_index(near, cell[v], L::splat_index(-2));
        low[v] = cell[v] >= L::splat_index(0);
        const I next = cell[v] + L::splat_index(1);
        high[v] = (next >= L::splat_index(0)) & (next < extent);
      }
      product[0] = L::select(near, given_weight, outside);
      pixel[0] = L::load_index(start + i);
      within[0] = far;
      UNROLL
      for (int v = 0; v < ND; v++) {
        const I along = L::load_index(step + v * table + i), first = cell[v] * along;
        UNROLL
        for (int q = (1 << v) - 1; q >= 0; q--) {
          const V more = product[q] * part[v];
          product[2 * q + 1] = more, product[2 * q] = product[q] - more;
          pixel[2 * q] = pixel[q] + first, pixel[2 * q + 1] = pixel[2 * q] + along;
          within[2 * q + 1] = within[q] & high[v], within[2 * q] = within[q] & low[v];
        }
      }
      UNROLL
      for (int q = 0; q < Q; q++) {
        L::store(factor + q * table + i, product[q]);
        L::store_index(index + q * table + i,
                       L::select_index(L::mask(within[q] < L::splat_index(0)), pixel[q], far));
      }
    }
  }

  // Makes offsets of indices. The rows of the pixels [first, first + pixels) are `by` elements
  // apart; all other pixels are the one row at `outside`.
  void place(i64 first, i64 pixels, i64 by, i64 outside) {
    for (i64 i = 0; i < Q * table; i++) {
      const i32 pixel = index[i] - i32(first);
      offset[i] = uint32_t(pixel) < uint32_t(pixels) ? i64(pixel) * i64(i32(by)) : outside;
    }
  }

  // Bring the beginning of each corner's row into the cache.
  void fetch(const T* rows, i64 channels) const {
    for (i64 i = 0; i < Q * table; i++)
      for (i64 c = 0; c < channels; c += 64 / i64(sizeof(T))) PREFETCH(rows + offset[i] + c);
  }

  // From dots [corner][table], the products of the corners with the output's gradient, make the
  // gradients of the weights and of the locations, each in its own layout.
  void contract(const T* dots, T* by_weight, T* by_location) {
    for (i64 i = 0; i < table; i += N) {
      const V sample = contracted(dots + i, i, -1);
      taint = taint + sample * L::zero();
      L::store(by_weight + i, sample);
      const V given_weight = L::load(weight + i);
      UNROLL
      for (int v = 0; v < ND; v++) {
        const V slope = contracted(dots + i, i, v) * given_weight * L::load(scale + v * table + i);
        taint = taint + slope * L::zero();
        T lanes[N];
        L::store(lanes, slope);
        for (int lane = 0; lane < N; lane++)
          by_location[(i + lane) * ND + ND - 1 - v] = lanes[lane];
      }
    }
  }

  // Interpolate the dots along all axes but `skip`, and take the slope along that one.
  INLINE V contracted(const T* dots, i64 i, int skip) const {
    V corner[Q];
    UNROLL
    for (int q = 0; q < Q; q++) corner[q] = L::load(dots + q * table);
    UNROLL
    for (int v = ND - 1; v >= 0; v--) {
      const V part = L::load(fraction + v * table + i);
      UNROLL
      for (int q = 0; q < 1 << v; q++) {
        const V slope = corner[2 * q + 1] - corner[2 * q];
        corner[q] = v == skip ? slope : corner[2 * q] + part * slope;
      }
    }
    return corner[0];
  }

  T tainted() const {
    T sum = 0;
    for (int lane = 0; lane < N; lane++) sum += L::lane(taint, lane);
    return sum;
  }
};

// What the loops over channels need: the rows of one query and head, and what is made of them.
template <class T>
struct Rows {
  i64 count, table;
  const i64* offset;
  const T* factor;
  const T* value;  // first row of the head
  T* to;           // the output, or first row of the copy of the value's gradient
  const T* grad;   // the output's gradient
  T* dots;         // [corner][table], to which each block of channels adds
};

// A block has NC vectors of N lanes.
template <class T, int Q, int N, int NC>
NOINLINE void attend_block(const Rows<T>& r) {
  using L = Lanes<T, N>;
  using V = typename L::V;
  constexpr int Sums = NC >= 4 ? 1 : Q < 4 / NC ? Q : 4 / NC;
  const i64 count = r.count, table = r.table;
  const i64* RESTRICT offset = r.offset;
  const T* RESTRICT factor = r.factor;
  const T* RESTRICT value = r.value;
  V sums[Sums][NC];
  UNROLL
  for (int i = 0; i < Sums * NC; i++) sums[i / NC][i % NC] = L::zero();
  for (i64 i = 0; i < count; i++) {
    UNROLL
    for (int q = 0; q < Q; q++) {
      const T* row = value + offset[q * table + i];
      const V f = L::splat(factor[q * table + i]);
      UNROLL
      for (int v = 0; v < NC; v++) sums[q % Sums][v] = sums[q % Sums][v] + f * L::load(row + v * N);
    }
  }
  UNROLL
  for (int v = 0; v < NC; v++) {
    UNROLL
    for (int i = 1; i < Sums; i++) sums[0][v] = sums[0][v] + sums[i][v];
    L::store(r.to + v * N, sums[0][v]);
  }
}

template <class T, int Q, int N, int NC>
NOINLINE void dot_block(const Rows<T>& r) {
  using L = Lanes<T, N>;
  using Four = Lanes<T, 4>;
  using V = typename L::V;
  const i64 table = r.table;
  const T* RESTRICT value = r.value;
  V grad[NC];
  UNROLL
  for (int v = 0; v < NC; v++) grad[v] = L::load(r.grad + v * N);
  for (i64 i = 0; i < Q * table; i += 4) {
    V dot[4];
    UNROLL
    for (int j = 0; j < 4; j++) {
      const T* row = value + r.offset[i + j];
      dot[j] = grad[0] * L::load(row);
      UNROLL
      for (int v = 1; v < NC; v++) dot[j] = dot[j] + grad[v] * L::load(row + v * N);
    }
    Four::store(r.dots + i, Four::load(r.dots + i) + L::sum4(dot[0], dot[1], dot[2], dot[3]));
  }
}

template <class T, int Q, int N, int NC>
NOINLINE void spread_block(const Rows<T>& r) {
  using L = Lanes<T, N>;
  using V = typename L::V;
  const i64 count = r.count, table = r.table;
  const i64* offset = r.offset;
  const T* factor = r.factor;
  T* to = r.to;
  V grad[NC];
  UNROLL
  for (int v = 0; v < NC; v++) grad[v] = L::load(r.grad + v * N);
  for (i64 i = 0; i < count; i++) {
    UNROLL
    for (int q = 0; q < Q; q++) {
      T* row = to + offset[q * table + i];
      const V f = L::splat(factor[q * table + i]);
      UNROLL
      for (int v = 0; v < NC; v++) L::store(row + v * N, L::load(row + v * N) + f * grad[v]);
    }
  }
}

enum Step { kAttend, kDot, kSpread };

template <Step step, class T, int Q, int N, int NC>
INLINE void block(const Rows<T>& r) {
  if constexpr (step == kAttend)
    attend_block<T, Q, N, NC>(r);
  else if constexpr (step == kDot)
    dot_block<T, Q, N, NC>(r);
  else
    spread_block<T, Q, N, NC>(r);
}

// Go through all channels, a multiple of 4, in blocks as wide as possible.
template <Step step, class T, int Q>
void by_blocks(Rows<T> r, i64 channels) {
  constexpr int N = Machine<T>::lanes, Half = N < 8 ? N : 8;
  while (channels > 0) {
    i64 done = 4;
    if (channels >= 4 * N)
      done = 4 * N, block<step, T, Q, N, 4>(r);
    else if (channels >= 2 * N)
      done = 2 * N, block<step, T, Q, N, 2>(r);
    else if (channels >= N)
      done = N, block<step, T, Q, N, 1>(r);
    else if (channels >= Half)
      done = Half, block<step, T, Q, Half, 1>(r);
    else
      block<step, T, Q, 4, 1>(r);
    channels -= done;
    r.value += done, r.to += done, r.grad += done;
  }
}

template <class T, int ND>
Status attend(const Attention& call) {
  constexpr int N = Machine<T>::lanes, Q = 1 << ND;
  const i64 channels = call.channels, heads = call.heads, pixels = call.pixels;
  const i64 by = heads * channels, images = call.batch, tasks = divide_up(call.queries, kQueries);
  const double samples =
      double(images) * double(call.queries * by) * double(call.levels * call.points);
  const i64 threads = call.exactly
                          ? call.threads
                          : threads_worth(samples / double(kSamplesPerThread), call.threads);
  const i64 team = threads > 1 && !call.alone ? call.threads : 1;
  // How the value's gradient is cut, see Note [attention]: parts of a head's channels, and bands of
  // pixels.
  const bool scatters = call.reverse && call.grad_value.data;
  const bool queried = !call.reverse || call.grad_locations.data || call.grad_weights.data;
  const i64 wanted = divide_up(threads, images * heads);
  const i64 part = round_up(divide_up(channels, least(wanted, divide_up(channels, N))), 4);
  const i64 parts = divide_up(channels, part);
  const i64 bands =
      most(divide_up(wanted, parts), divide_up(pixels * part * i64(sizeof(T)), kFlightBytes));
  const i64 band = divide_up(pixels, least(bands, pixels));

  struct Scratch {
    Corners<T, ND> corners[2];
    T *row, *dots, *by_weight, *by_location, *rows;
    Scratch(Carver& c, const Attention& call, i64 rows_size)
        : corners{{c, call}, {c, call}},
          row(c.take<T>(call.channels)),
          dots(c.take<T>(call.reverse ? Q * corners[0].table : 0)),
          by_weight(c.take<T>(call.reverse ? corners[0].table : 0)),
          by_location(c.take<T>(call.reverse ? ND * corners[0].table : 0)),
          rows(c.take<T>(rows_size)) {}
  };
  const i64 rows_size = scatters ? (band + 1) * part : 0;
  Carver measure{nullptr};
  Scratch(measure, call, rows_size);
  const i64 scratch_bytes = i64(measure.used);
  T *zeros, *taints;
  char* scratch;
  const auto layout = [&](Carver c) {
    zeros = c.take<T>(channels);
    taints = c.take<T>(team);
    scratch = c.take<char>(team * scratch_bytes);
    return c.used;
  };
  char* memory = workspace_take(layout(Carver{nullptr}));
  if (!memory) return kNoMemory;
  layout(Carver{memory});
  memset(zeros, 0, size_t(channels) * sizeof(T));
  memset(taints, 0, size_t(team) * sizeof(T));

  const T* value = reinterpret_cast<const T*>(call.value.data);
  const Array& result = call.reverse ? call.grad_value : call.output;
  const i64 rows = call.reverse ? pixels : call.queries;
  const i64 pages = touch_tasks(result, images * rows * by, team);
  together(team, [&](const Worker& worker) {
    Carver carver{scratch + worker.thread * scratch_bytes};
    Scratch s(carver, call, rows_size);
    Corners<T, ND>* corners = s.corners;
    for (int i = 0; i < 2; i++) corners[i].prepare();
    Corners<T, ND>& samples = corners[0];
    if (pages) worker.share(pages, [&](i64 task) { touch(result, task); });
    if (queried)
      worker.share(images * tasks, [&](i64 task) {
        const i64 image = task / tasks, first = task % tasks * kQueries;
        const i64 count = least(kQueries, call.queries - first) * heads;
        const i64 begin = (image * call.queries + first) * heads;
        const auto find = [&](i64 i) {
          const T* base = value + image * pixels * by + i % heads * channels;
          const i64 outside =
              (reinterpret_cast<intptr_t>(zeros) - reinterpret_cast<intptr_t>(base)) /
              i64(sizeof(T));
          corners[i % 2].find(begin + i);
          corners[i % 2].place(0, pixels, by, outside);
          corners[i % 2].fetch(base, channels);
          return base;
        };
        const T* next = find(0);
        for (i64 i = 0; i < count; i++) {
          const T* base = next;
          if (i + 1 < count) next = find(i + 1);
          Corners<T, ND>& samples = corners[i % 2];
          const i64 row = begin + i;
          Rows<T> r{samples.count, samples.table, samples.offset, samples.factor,
                    base,          s.row,         s.row,          s.dots};
          if (!call.reverse) {
            const bool direct = call.output.dtype == DtypeOf<T>::value;
            if (direct) r.to = reinterpret_cast<T*>(call.output.data) + row * channels;
            by_blocks<kAttend, T, Q>(r, channels);
            if (!direct) write(call.output, row * channels, channels, s.row);
            continue;
          }
          r.grad = view(call.output, row * channels, channels, s.row);
          memset(s.dots, 0, size_t(Q * samples.table) * sizeof(T));
          by_blocks<kDot, T, Q>(r, channels);
          samples.contract(s.dots, s.by_weight, s.by_location);
          const i64 all = samples.count;
          if (call.grad_weights.data) write(call.grad_weights, row * all, all, s.by_weight);
          if (call.grad_locations.data)
            write(call.grad_locations, row * all * ND, all * ND, s.by_location);
        }
      });
    if (scatters)
      worker.share(images * heads * parts * bands, [&](i64 task) {
        const i64 first = task % bands * band, here = least(band, pixels - first);
        if (here <= 0) return;
        const i64 channel = task / bands % parts * part, some = least(part, channels - channel);
        const i64 head = task / bands / parts % heads, image = task / bands / parts / heads;
        memset(s.rows, 0, size_t(rows_size) * sizeof(T));
        for (i64 query = 0; query < call.queries; query++) {
          const i64 row = (image * call.queries + query) * heads + head;
          samples.find(row);
          samples.place(first, here, part, band * part);
          const T* grad = view(call.output, row * channels + channel, some, s.row);
          by_blocks<kSpread, T, Q>({samples.count, samples.table, samples.offset, samples.factor,
                                    s.row, s.rows, grad, s.dots},
                                   some);
        }
        for (i64 pixel = 0; pixel < here; pixel++)
          write(call.grad_value,
                ((image * pixels + first + pixel) * heads + head) * channels + channel, some,
                s.rows + pixel * part);
      });
    taints[worker.thread] = corners[0].tainted() + corners[1].tainted();
  });
  const Status status = status_of(taints, team);
  workspace_give(team);
  return status;
}
