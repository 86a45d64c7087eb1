// How a call is cut into blocks of channels, tiles of pixels and chunks of columns, and how packed.
// Included by kernel.cpp inside the namespace of one instruction set.

// Units [unit, unit + count) of one weight group, for one product.
struct Chunk {
  i64 unit, count, group;
  i64 panels;   // in Reverse: how many panels its columns fill
  i64 weights;  // in Reverse: where its packed weights begin, in words
};

// A tile of output pixels: `segments` runs of `length` consecutive pixels, or one run of whole
// rows.
struct Tile {
  i64 image, first;  // pixel
  i64 row, column, rows, columns;
  i64 segments, length, step;  // step: pixels between the starts of two segments
  i64 count;
};

// How many of these threads a call is worth; `worth` counts pieces of work of 20 microseconds, ten
// times what it costs to wake a thread. Each thread wants one. With less than two pieces in all, or
// a little more where the whole large team would have to wake, one thread does everything.
inline i64 threads_worth(double worth, i64 threads) {
  if (worth < 2 + double(threads - 2) / 8) return 1;
  return worth < double(threads) ? i64(worth) : threads;
}

template <class T, int ND>
struct Plan {
  static constexpr int Q = 1 << ND, Dots = Q < 4 ? 4 : Q;
  static constexpr int N = Machine<T>::lanes;
  static constexpr i64 kLine = 64 / sizeof(T);

  const Call& call;
  i64 batch, image_channels, point_channels, groups, offset_groups, mask_groups;
  i64 image_size[ND], point_size[ND], kernel[ND], stride[ND], padding[ND], dilation[ND];
  i64 threads;             // for how many threads the work is cut
  i64 team;                // how many threads run it
  bool depthwise, planar;  // see the notes of these names
  i64 K, P, pixels;        // kernel points, point positions, image pixels
  i64 padded[ND], plane;   // sizes and pixels of a packed plane
  i64 sample_groups;       // each is the channels of one offset group and one mask group
  i64 runs, run;           // runs of channels of one sample and one weight group; a run's length
  int lanes, vectors;      // a block is so many vectors of so many lanes
  i64 block, blocks_per_run, blocks;
  i64 words;                         // words of a packed pixel of a block
  i64 depth;                         // channels of a unit's columns
  i64 group_points, group_channels;  // channels of a weight group
  i64 point_words;                   // words of a weight group's points, as an inner dimension
  int panel_vectors;
  i64 panel, panels, group_width;  // the points of a weight group in panels
  i64 tile_rows, tile_columns, row_tiles, column_tiles, tiles, tile_pixels, table;
  i64 tile_room;  // pixels that buffers have room for
  i64 steps[Q];

  Plan(const Call& c, int widest, i64 parts) : call(c) {
    batch = c.batch, image_channels = c.image_channels, point_channels = c.point_channels;
    groups = c.groups, offset_groups = c.offset_groups, mask_groups = c.mask_groups;
    K = P = pixels = plane = 1;
    for (int v = 0; v < ND; v++) {
      image_size[v] = c.image_size[v], point_size[v] = c.point_size[v], kernel[v] = c.kernel[v];
      stride[v] = c.stride[v], padding[v] = c.padding[v], dilation[v] = c.dilation[v];
      padded[v] = image_size[v] + (v == 0 ? 3 : 2);
      K *= kernel[v], P *= point_size[v], pixels *= image_size[v], plane *= padded[v];
    }
    sample_groups = lcm(most(offset_groups, 1), most(mask_groups, 1));
    depthwise = c.depthwise;
    if (depthwise) groups = 1;
    runs = lcm(sample_groups, groups), run = image_channels / runs;
    lanes = run > 8 || N <= 4 ? N : run <= 4 ? 4 : least(8, N);
    const i64 run_vectors = divide_up(run, lanes);
    vectors = 1;
    if (lanes == N)
      for (int f = widest; f > 1; f /= 2)
        if (run_vectors % f == 0 && runs * run_vectors / f >= parts) {
          vectors = f;
          break;
        }
    block = lanes * vectors, words = block / kPerWord, blocks_per_run = run_vectors / vectors;
    blocks = runs * blocks_per_run;
    planar = !kPairs && !depthwise && run <= 4, depth = planar ? run : block;
    if (depthwise) groups = blocks;
    group_points = depthwise ? block : point_channels / groups;
    group_channels = depthwise ? 1 : image_channels / groups;
    point_words = kPairs ? round_up(group_points, kTileNumbers) / 2 : group_points;
    panel_vectors = group_points <= N ? 1 : 2;
    panel = depthwise ? block : panel_vectors * N;
    panels = divide_up(group_points, panel);
    group_width = panels * panel;

    threads = threads_for(c);
    team = threads > 1 && !c.alone ? c.threads : 1;  // Either all or one, see Note [threads].

    const i64 width = point_size[ND - 1], rows = P / width;
    // In Gather tiles of pairs may be twice as large: they take half the bytes, and AMX multiplies
    // twice as many rows at a time.
    const bool twice = kPairs && c.gather && !depthwise;
    const i64 pixels_of_tile = twice ? 2 * kTilePixels : kTilePixels;
    const i64 wanted = narrow()    ? kWideTile
                       : depthwise ? kTilePixels  // Here, too, coordinates dominate the time.
                                   : most(kTileWidth, pixels_of_tile / rows);
    const i64 columns = divide_up(width, divide_up(width, least(wanted, width)));
    i64 rows_of_tile = most(1, least(rows, (pixels_of_tile + columns / 2) / columns));
    // A tile's pixels fill vectors row after row. A tile of short rows has many rows, so that few
    // of its vectors are partly empty.
    if (planar) rows_of_tile = divide_up(rows, divide_up(rows, most(1, kWideTile / columns)));
    cut_tiles(rows_of_tile, columns);

    for (int q = 0; q < Q; q++) {
      steps[q] = 0;
      for (int v = 0; v < ND; v++)
        if (q >> (ND - 1 - v) & 1) steps[q] += axis_step(v) * block;
    }
  }

  // To how many points a sample's products take as long as the sample itself. With AMX, which
  // multiplies eight times as fast, they are eight times as many.
  static i64 points_per_sample(const Call& c) { return kPairs && c.tiles ? 128 : 16; }

  static i64 threads_for(const Call& c) {
    if (c.exactly) return c.threads;
    const i64 sample = points_per_sample(c);
    double work = double(c.batch) * c.image_channels * (c.point_channels / c.groups + sample);
    for (int v = 0; v < ND; v++) work *= double(c.point_size[v] * c.kernel[v]);
    return threads_worth(work / (double(kSamplesPerThread) * double(sample)), c.threads);
  }

  void cut_tiles(i64 rows, i64 columns) {
    const i64 width = point_size[ND - 1];
    tile_rows = rows, tile_columns = columns;
    row_tiles = divide_up(P / width, rows), column_tiles = divide_up(width, columns);
    tiles = row_tiles * column_tiles, tile_pixels = rows * columns;
    tile_room = kPairs ? round_up(tile_pixels, kTileNumbers) : tile_pixels;
    // The distance of two rows is an odd number of cache lines, so that the rows of a panel do not
    // compete for the same places in the cache.
    if (planar) tile_room = (divide_up(round_up(tile_pixels, 2 * N), kLine) | 1) * kLine;
    table = round_up(tile_pixels, N) + N;
  }

  // Cut smaller tiles, and cut the panels of points into parts, where `workers` then get through
  // `images` sooner; returns the number of parts. Each tile costs as much as 16 pixels more, since
  // the weights have to come into the cache for it.
  i64 share_tiles(i64 images, i64 workers, i64 most_parts) {
    if (workers == 1) return 1;
    const i64 sample = points_per_sample(call);
    i64 best_rows = 0, best_columns = 0, best_parts = 1, least_cost = 0;
    for (;;) {
      for (i64 parts = 1; parts <= most_parts; parts++) {
        const i64 tasks = images * tiles * parts, some = divide_up(most_parts, parts);
        const i64 cost = divide_up(tasks, workers) * (tile_pixels + 16) *
                         (some * panel + divide_up(some, panels) * sample);
        if (least_cost == 0 || cost < least_cost)
          best_rows = tile_rows, best_columns = tile_columns, best_parts = parts, least_cost = cost;
        if (tasks >= workers) break;
      }
      if (tile_pixels <= 16) break;
      if (tile_rows > 1)
        cut_tiles(tile_rows - 1, tile_columns);
      else
        cut_tiles(1, divide_up(point_size[ND - 1], column_tiles + divide_up(column_tiles, 8)));
    }
    cut_tiles(best_rows, best_columns);
    return best_parts;
  }

  // Whether coordinates and samples dominate the time, and not the products.
  bool narrow() const { return block <= 8; }

  // Whether Gather takes tiles in stacks, see there. It does not where a sample group has several
  // blocks: a stack comes to a tile anew for every few columns, and would have to find the same
  // cells again for each block.
  bool stacks() const { return narrow() && blocks_per_sample_group() == 1; }

  // How many tiles make a stack: fewer than kStack where `workers` would otherwise wait for the
  // last stack longer than a sixteenth of the whole time. Each tile is taken `copies` times.
  i64 stack_tiles(i64 copies, i64 workers) const {
    const auto rounds = [&](i64 n) {
      return n * divide_up(copies * column_tiles * divide_up(row_tiles, n), workers);
    };
    i64 stack = stacks() ? least(kStack, row_tiles) : 1;
    while (workers > 1 && stack > 1 && rounds(stack) > rounds(1) * 17 / 16) stack--;
    return stack;
  }

  i64 axis_step(int axis) const {
    i64 step = 1;
    for (int v = axis + 1; v < ND; v++) step *= padded[v];
    return step;
  }
  // The place of a kernel point, and of an axis, among the offsets and masks of a group.
  i64 given_point(i64 k) const {
    if (!call.backwards) return k;
    i64 place = 0;
    for (int v = ND - 1; v >= 0; v--) place = place * kernel[v] + k % kernel[v], k /= kernel[v];
    return place;
  }
  int given_axis(int v) const { return call.backwards ? ND - 1 - v : v; }

  i64 outside() const { return (image_size[0] + 1) * axis_step(0); }
  i64 image_bytes() const { return blocks * plane * block * i64(sizeof(T)); }
  i64 pair_lanes() const { return block == 4 ? 1 : least(N, words); }  // see Note [pairs]
  i64 units() const { return blocks * K; }
  i64 blocks_per_sample_group() const { return blocks / sample_groups; }
  i64 sample_group(i64 b) const { return b / blocks_per_sample_group(); }
  i64 offset_group(i64 s) const { return s * offset_groups / sample_groups; }
  i64 mask_group(i64 s) const { return s * mask_groups / sample_groups; }
  i64 channel(i64 b) const { return b / blocks_per_run * run + b % blocks_per_run * block; }
  i64 block_channels(i64 b) const { return least(block, run - b % blocks_per_run * block); }

  i64 group_point(i64 group) const { return depthwise ? channel(group) : group * group_points; }
  i64 points_in(i64 group) const { return depthwise ? block_channels(group) : group_points; }

  // The words that the columns of so many units take for each pixel, as an inner dimension.
  i64 column_words(i64 units) const {
    return kPairs ? round_up(units * words, kTileWords) : units * depth;
  }

  i64 units_per_chunk(i64 units_together, i64 alignment, i64 columns = kColumns) const {
    const i64 align = most(1, alignment / block);
    const i64 count = most(1, (units_together * block + columns / 2) / columns);
    return round_up(divide_up(units_together, count), align);
  }

  Tile tile(i64 image, i64 t) const {
    const i64 width = point_size[ND - 1];
    Tile x;
    x.image = image;
    x.row = t / column_tiles * tile_rows, x.column = t % column_tiles * tile_columns;
    x.rows = least(tile_rows, P / width - x.row);
    x.columns = least(tile_columns, width - x.column);
    x.first = x.row * width + x.column;
    x.count = x.rows * x.columns;
    const bool whole = x.columns == width && x.count <= kPiece;
    x.segments = whole ? 1 : x.rows, x.length = whole ? x.count : x.columns, x.step = width;
    return x;
  }
};

template <class T>
Status status_of(const T* taints, i64 threads) {
  T taint = 0;
  for (i64 i = 0; i < threads; i++) taint += taints[i];
  return taint != 0 ? kOdd : kDone;
}

// Cut the blocks [from, to) into chunks. Returns how many they are; adds the size of their packed
// weights to *weights, and raises *widest to the columns of the widest.
template <class T, int ND>
i64 cut(const Plan<T, ND>& p, i64 from, i64 to, Chunk* chunks, i64* weights, i64* widest) {
  const i64 group_blocks = p.blocks / p.groups;
  i64 n = 0;
  for (i64 b = from; b < to;) {
    const i64 group = b / group_blocks, end = least(to, (group + 1) * group_blocks);
    const i64 size = p.units_per_chunk((end - b) * p.K, 2 * p.N);
    for (i64 u = b * p.K; u < end * p.K; u += size) {
      const i64 count = least(size, end * p.K - u);
      const i64 panels = divide_up(count * p.block, 2 * p.N);
      if (chunks) chunks[n] = {u, count, group, panels, p.depthwise ? u * p.block : *weights};
      *weights += panels * 2 * p.N * p.point_words;
      *widest = most(*widest, panels * 2 * p.N);
      n++;
    }
    b = end;
  }
  return n;
}

// Field::load of at most four channels, which come first, as to[4 p + c] with zeros for others.
template <class T>
NOINLINE void load_four(const Field<T>& field, i64 image, i64 channel, i64 count, i64 pixel, i64 n,
                        T* to, T* scratch) {
  using L = Lanes<T, Machine<T>::lanes>;
  constexpr i64 N = L::size;
  const T* from[4] = {};
  for (i64 c = 0; c < count; c++)
    from[c] = view(field.array, field.at(image, channel + c, pixel), n, scratch + c * kPiece);
  if (n < N) {
    for (i64 p = 0; p < n; p++)
      for (i64 c = 0; c < 4; c++) to[4 * p + c] = c < count ? from[c][p] : 0;
    return;
  }
  for (i64 p0 = 0; p0 < n; p0 += N) {
    const i64 p = least(p0, n - N);  // The last step overlaps the one before.
    typename L::V a[4];
    UNROLL
    for (int c = 0; c < 4; c++) a[c] = c < count ? L::load(from[c] + p) : L::zero();
    L::template transpose<4>(a);
    memcpy(to + 4 * p, a, sizeof a);
  }
}

// Field::store of at most four channels, which come first, from from[4 p + c].
template <class T>
NOINLINE void store_four(const Field<T>& field, i64 image, i64 channel, i64 count, i64 pixel, i64 n,
                         const T* from, T* scratch) {
  using L = Lanes<T, Machine<T>::lanes>;
  constexpr i64 N = L::size;
  const bool direct = field.array.dtype == DtypeOf<T>::value;
  T* to[4] = {};
  for (i64 c = 0; c < count; c++) {
    const i64 at = field.at(image, channel + c, pixel);
    to[c] = direct ? reinterpret_cast<T*>(field.array.data) + at : scratch + c * kPiece;
  }
  if (n < N)
    for (i64 p = 0; p < n; p++)
      for (i64 c = 0; c < count; c++) to[c][p] = from[4 * p + c];
  for (i64 p0 = 0; n >= N && p0 < n; p0 += N) {
    const i64 p = least(p0, n - N);
    typename L::V a[4];
    UNROLL
    for (int i = 0; i < 4; i++) {
      const T* places[N / 4];
      UNROLL
      for (int l = 0; l < N / 4; l++) places[l] = from + 4 * (p + 4 * l + i);
      a[i] = L::load4(places);
    }
    L::transpose4(a);
    UNROLL
    for (int c = 0; c < 4; c++)
      if (c < count) L::store(to[c] + p, a[c]);
  }
  for (i64 c = 0; c < count && !direct; c++)
    write(field.array, field.at(image, channel + c, pixel), n, to[c]);
}

// A task packs a row of the image, or a piece of one. pack_image_tasks says how many there are.
template <class T, int ND>
void pack_image(const Plan<T, ND>& p, i64 first, i64 task, T* packed, T* scratch) {
  const Field<T> image{p.call.image, p.image_channels, p.pixels};
  const i64 width = p.image_size[ND - 1], padded = p.padded[ND - 1], rows = p.plane / padded;
  const i64 pieces = divide_up(width, kPiece), x = task % pieces * kPiece;
  task /= pieces;
  const i64 n = task / rows / p.blocks, b = task / rows % p.blocks;
  T* line = packed + task * padded * p.words;
  i64 rest = task % rows, row = 0, step = 1;
  bool inside = true;
  for (int v = ND - 2; v >= 0; v--) {
    const i64 at = rest % p.padded[v] - 1;
    rest /= p.padded[v];
    inside = inside && at >= 0 && at < p.image_size[v];
    row += at * step, step *= p.image_size[v];
  }
  const i64 count = p.block_channels(b);
  const auto zero = [&](i64 begin, i64 end) {
    memset(line + begin * p.words, 0, size_t((end - begin) * p.words) * sizeof(T));
  };
  if (x == 0) zero(0, 1);
  const bool four = p.block == 4 && !kPairs && !image.array.last;
  if (!inside || (count < p.block && !four)) zero(x + 1, least(width, x + kPiece) + 1);
  if (x + kPiece >= width) zero(width + 1, padded);
  if (!inside) return;
  const i64 pixel = row * width + x, some = least(kPiece, width - x);
  T* to = line + (x + 1) * p.words;
  if constexpr (kPairs)
    load_pairs(image, first + n, p.channel(b), count, pixel, some, p.pair_lanes(), p.words, to,
               p.words, scratch);
  else if (four)
    load_four(image, first + n, p.channel(b), count, pixel, some, to, scratch);
  else
    image.load(first + n, p.channel(b), count, pixel, some, to, p.block, scratch);
}

template <class T, int ND>
i64 pack_image_tasks(const Plan<T, ND>& p, i64 images) {
  return images * p.blocks * (p.plane / p.padded[ND - 1]) * divide_up(p.image_size[ND - 1], kPiece);
}

// Pack the weights of one point channel and one block as [kernel point][channel of `width`], with
// zeros where the block has fewer channels.
template <class T, int ND>
void load_weight(const Plan<T, ND>& p, i64 point, i64 b, T* to, i64 width, T* scratch) {
  const i64 count = p.block_channels(b), channel = p.channel(b) % p.group_channels;
  const i64 at = (point * p.group_channels + channel) * p.K;
  if (count < width) memset(to, 0, size_t(p.K * width) * sizeof(T));
  transpose(view(p.call.weight, at, count * p.K, scratch), p.K, to, width, p.K, count);
}

// For Note [planar]: [point][column of the group]; a task for each block and point of its group
template <class T, int ND>
void pack_weight_by_plane(const Plan<T, ND>& p, i64 task, T* packed, T* scratch) {
  const i64 b = task / p.group_points, group_blocks = p.blocks / p.groups;
  const i64 point = b / group_blocks * p.group_points + task % p.group_points;
  load_weight(p, point, b, packed + (point * group_blocks + b % group_blocks) * p.K * p.run, p.run,
              scratch);
}

// For Note [depthwise]: [unit][channel of the block]; a task for each block
template <class T, int ND>
void pack_weight_by_channel(const Plan<T, ND>& p, i64 b, T* packed, T* scratch) {
  const i64 count = p.block_channels(b);
  T* to = packed + b * p.K * p.block;
  if (count < p.block) memset(to, 0, size_t(p.K * p.block) * sizeof(T));
  const T* from = view(p.call.weight, p.channel(b) * p.K, count * p.K, scratch);
  transpose(from, p.K, to, p.block, p.K, count);
}

// For Gather: [group][panel of points][word of the group's columns][point of the panel]; a task
// for each vector of points and block
template <class T, int ND>
void pack_weight_by_point(const Plan<T, ND>& p, i64 task, T* packed, T* scratch) {
  const i64 size = p.K * p.block, words = p.K * p.words, group_blocks = p.blocks / p.groups;
  const i64 part = task % p.panel_vectors, b = task / p.panel_vectors % group_blocks;
  const i64 panel = task / p.panel_vectors / group_blocks;  // among those of all groups
  const i64 group = panel / p.panels, first = panel % p.panels * p.panel + part * p.N;
  T* spare = scratch + p.N * words;
  for (i64 i = 0; i < p.N; i++) {
    T* row = scratch + i * words;
    if (first + i >= p.group_points) {
      memset(row, 0, size_t(words) * sizeof(T));
      continue;
    }
    T* numbers = kPairs ? spare + size : row;
    load_weight(p, group * p.group_points + first + i, group * group_blocks + b, numbers, p.block,
                spare);
    if constexpr (kPairs)
      convert(numbers, size, reinterpret_cast<uint16_t*>(row),
              [](T f) { return uint16_t(to_bits(f) >> 16); });
  }
  const i64 group_words = p.column_words(group_blocks * p.K);
  T* to = packed + (panel * group_words + b * words) * p.panel + part * p.N;
  transpose(scratch, words, to, p.panel, words, p.N);
  if (b == group_blocks - 1)
    for (i64 w = words; w < group_words - b * words; w++)
      memset(to + w * p.panel, 0, size_t(p.N) * sizeof(T));
}

// Run body(at, chunk, panel, column, n) for the runs [at, at + n) of a block's columns that lie in
// one panel of a chunk, from its `column` on.
template <class T, int ND, class Body>
void each_run(const Plan<T, ND>& p, const Chunk* chunks, i64 count, i64 b, const Body& body) {
  const i64 width = 2 * p.N, first = b * p.K, end = first + p.K;
  i64 low = 0, high = count;  // A binary search finds the chunk of the block's first unit.
  while (high - low > 1) {
    const i64 middle = (low + high) / 2;
    (chunks[middle].unit <= first ? low : high) = middle;
  }
  for (i64 unit = first; unit < end; low++) {
    const Chunk& chunk = chunks[low];
    const i64 stop = least(end, chunk.unit + chunk.count);
    i64 column = (unit - chunk.unit) * p.block;
    const i64 column_end = (stop - chunk.unit) * p.block;
    for (i64 at = (unit - first) * p.block; column < column_end;) {
      const i64 n = least(column_end - column, width - column % width);
      body(at, chunk, column / width, column % width, n);
      column += n, at += n;
    }
    unit = stop;
  }
}

// For Reverse: [chunk][panel of columns][word of the group's points][column of the panel]; a task
// for each block and word
template <class T, int ND>
void pack_weight_by_column(const Plan<T, ND>& p, const Chunk* chunks, i64 count, i64 task,
                           T* packed, T* scratch) {
  const i64 width = 2 * p.N, group_blocks = p.blocks / p.groups, size = p.K * p.block;
  const i64 b = task / p.point_words, row = task % p.point_words;
  T* more = scratch + size;
  const auto load = [&](i64 o, T* to) {
    if (o < p.group_points)
      load_weight(p, b / group_blocks * p.group_points + o, b, to, p.block, more + size);
    else
      memset(to, 0, size_t(size) * sizeof(T));
  };
  if constexpr (kPairs) {
    const i64 o = row + row / kTileWords * kTileWords;
    load(o, scratch);
    load(o + kTileWords, more);
    pair_up(scratch, more, size, scratch);
  } else {
    load(row, scratch);
  }
  each_run(p, chunks, count, b, [&](i64 at, const Chunk& chunk, i64 panel, i64 column, i64 n) {
    T* to = packed + chunk.weights + (panel * p.point_words + row) * width + column;
    memcpy(to, scratch + at, size_t(n) * sizeof(T));
    if (panel * width + column + n == chunk.count * p.block)
      memset(to + n, 0, size_t(width - column - n) * sizeof(T));
  });
}
