// How a call is cut: blocks of channels, tiles of pixels, chunks of columns; and the packing.
// Included by kernel.cpp inside the namespace of one instruction set.

// Units [unit, unit + count) of one weight group, for one product.
struct Chunk {
  i64 unit, count, group;
  i64 panels;   // of its columns, where they are the product's columns (Reverse)
  i64 weights;  // where its packed weights begin (Reverse)
};

// A tile of output pixels: `segments` runs of `length` consecutive pixels, or one run of whole
// rows.
struct Tile {
  i64 image, first;  // pixel
  i64 row, column, rows, columns;
  i64 segments, length, step;  // step: pixels between the starts of two segments
  i64 count;
};

template <class T, int ND>
struct Plan {
  static constexpr int Q = 1 << ND, Dots = Q < 4 ? 4 : Q;
  static constexpr int N = Machine<T>::lanes;

  const Call& call;
  i64 batch, image_channels, point_channels, groups, offset_groups, mask_groups;
  i64 image_size[ND], point_size[ND], kernel[ND], stride[ND], padding[ND], dilation[ND];
  i64 threads;
  bool depthwise;
  i64 K, P, pixels;       // kernel points, point positions, image pixels
  i64 padded[ND], plane;  // sizes and pixels of a packed plane
  i64 sample_groups;      // one offset group and one mask group each
  i64 runs, run;          // runs of channels of one sample group and one weight group
  int lanes, vectors;     // of a block
  i64 block, blocks_per_run, blocks;
  i64 group_points, group_channels;  // channels of a weight group
  int panel_vectors;
  i64 panel, panels, group_width;  // the points of a weight group in panels
  i64 tile_rows, tile_columns, row_tiles, column_tiles, tiles, tile_pixels, table;
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
    depthwise = groups > 1 && groups == image_channels && groups == point_channels;
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
    block = lanes * vectors, blocks_per_run = run_vectors / vectors;
    blocks = runs * blocks_per_run;
    if (depthwise) groups = blocks;
    group_points = depthwise ? block : point_channels / groups;
    group_channels = depthwise ? 1 : image_channels / groups;
    panel_vectors = group_points <= N ? 1 : 2;
    panel = depthwise ? block : panel_vectors * N;
    panels = divide_up(group_points, panel);
    group_width = panels * panel;

    const i64 width = point_size[ND - 1], rows = P / width;
    const i64 wanted = block <= 8 ? kWideTile : most(kTileWidth, kTilePixels / rows);
    tile_columns = divide_up(width, divide_up(width, least(wanted, width)));
    tile_rows = most(1, least(rows, (kTilePixels + tile_columns / 2) / tile_columns));
    row_tiles = divide_up(rows, tile_rows), column_tiles = divide_up(width, tile_columns);
    tiles = row_tiles * column_tiles, tile_pixels = tile_rows * tile_columns;
    table = round_up(tile_pixels, N) + N;

    for (int q = 0; q < Q; q++) {
      steps[q] = 0;
      for (int v = 0; v < ND; v++)
        if (q >> (ND - 1 - v) & 1) steps[q] += axis_step(v) * block;
    }
    // A thread wants about 20 microseconds of work, ten times what waking it costs.
    const double work = double(batch) * P * K * image_channels * (group_points + 16);
    const double worth = c.exactly ? double(c.threads) : work / 2e6;
    threads = worth < double(c.threads) ? most(1, i64(worth)) : c.threads;
  }

  i64 axis_step(int axis) const {
    i64 step = 1;
    for (int v = axis + 1; v < ND; v++) step *= padded[v];
    return step;
  }
  i64 outside() const { return (image_size[0] + 1) * axis_step(0); }
  i64 image_bytes() const { return blocks * plane * block * i64(sizeof(T)); }
  i64 units() const { return blocks * K; }
  i64 blocks_per_sample_group() const { return blocks / sample_groups; }
  i64 sample_group(i64 b) const { return b / blocks_per_sample_group(); }
  i64 offset_group(i64 s) const { return s * offset_groups / sample_groups; }
  i64 mask_group(i64 s) const { return s * mask_groups / sample_groups; }
  i64 channel(i64 b) const { return b / blocks_per_run * run + b % blocks_per_run * block; }
  i64 block_channels(i64 b) const { return least(block, run - b % blocks_per_run * block); }

  i64 group_point(i64 group) const { return depthwise ? channel(group) : group * group_points; }
  i64 points_in(i64 group) const { return depthwise ? block_channels(group) : group_points; }

  i64 units_per_chunk(i64 units_together, i64 alignment) const {
    const i64 align = most(1, alignment / block);
    const i64 count = most(1, (units_together * block + kColumns / 2) / kColumns);
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

// The blocks [from, to) cut into chunks; returns how many, and adds up what they need.
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
      *weights += panels * 2 * p.N * p.group_points;
      *widest = most(*widest, panels * 2 * p.N);
      n++;
    }
    b = end;
  }
  return n;
}

template <class T, int ND>
void pack_image(const Plan<T, ND>& p, i64 first, i64 images, T* packed, T* scratch,
                i64 scratch_size) {
  const Field<T> image{p.call.image, p.image_channels, p.pixels};
  const i64 width = p.image_size[ND - 1], padded = p.padded[ND - 1], rows = p.plane / padded;
  parallel(p.threads, images * p.blocks * rows, [&](i64 task, i64 thread) {
    const i64 n = task / rows / p.blocks, b = task / rows % p.blocks;
    T* to = packed + task * padded * p.block;
    i64 rest = task % rows, row = 0, step = 1;
    bool inside = true;
    for (int v = ND - 2; v >= 0; v--) {
      const i64 at = rest % p.padded[v] - 1;
      rest /= p.padded[v];
      inside = inside && at >= 0 && at < p.image_size[v];
      row += at * step, step *= p.image_size[v];
    }
    const i64 count = p.block_channels(b);
    if (!inside || count < p.block) memset(to, 0, size_t(padded * p.block) * sizeof(T));
    if (!inside) return;
    memset(to, 0, size_t(p.block) * sizeof(T));
    memset(to + (width + 1) * p.block, 0, size_t((padded - width - 1) * p.block) * sizeof(T));
    for (i64 x = 0; x < width; x += kPiece)
      image.load(first + n, p.channel(b), count, row * width + x, least(kPiece, width - x),
                 to + (x + 1) * p.block, p.block, scratch + thread * scratch_size);
  });
}

// Weights of one point channel and one block as [kernel point][channel], zeros in the padding.
template <class T, int ND>
void load_weight(const Plan<T, ND>& p, i64 point, i64 b, T* to, T* scratch) {
  const i64 count = p.block_channels(b), channel = p.channel(b) % p.group_channels;
  const i64 at = (point * p.group_channels + channel) * p.K;
  if (count < p.block) memset(to, 0, size_t(p.K * p.block) * sizeof(T));
  transpose(view(p.call.weight, at, count * p.K, scratch), p.K, to, p.block, p.K, count);
}

// For Note [depthwise]: [unit][channel of the block]
template <class T, int ND>
void pack_weight_by_channel(const Plan<T, ND>& p, T* packed, T* scratch, i64 scratch_size) {
  parallel(p.threads, p.blocks, [&](i64 b, i64 thread) {
    const i64 count = p.block_channels(b);
    T* to = packed + b * p.K * p.block;
    if (count < p.block) memset(to, 0, size_t(p.K * p.block) * sizeof(T));
    const T* from =
        view(p.call.weight, p.channel(b) * p.K, count * p.K, scratch + thread * scratch_size);
    transpose(from, p.K, to, p.block, p.K, count);
  });
}

// For Gather: [group][panel of points][column of the group][point of the panel]
template <class T, int ND>
void pack_weight_by_point(const Plan<T, ND>& p, T* packed, T* scratch, i64 scratch_size) {
  const i64 size = p.K * p.block, group_blocks = p.blocks / p.groups;
  parallel(p.threads, p.groups * p.panels * group_blocks, [&](i64 task, i64 thread) {
    const i64 b = task % group_blocks, j = task / group_blocks % p.panels;
    const i64 group = task / group_blocks / p.panels;
    T* rows = scratch + thread * scratch_size;
    T* spare = rows + p.panel * size;
    for (i64 i = 0; i < p.panel; i++) {
      const i64 point = j * p.panel + i;
      if (point < p.group_points)
        load_weight(p, group * p.group_points + point, group * group_blocks + b, rows + i * size,
                    spare);
      else
        memset(rows + i * size, 0, size_t(size) * sizeof(T));
    }
    transpose(rows, size, packed + task * size * p.panel, p.panel, size, p.panel);
  });
}

// For Reverse: [chunk][panel of columns][point of the group][column of the panel]
template <class T, int ND>
void pack_weight_by_column(const Plan<T, ND>& p, const Chunk* chunks, i64 count, T* packed,
                           T* scratch, i64 scratch_size) {
  const i64 width = 2 * p.N, group_blocks = p.blocks / p.groups;
  parallel(p.threads, p.blocks * p.group_points, [&](i64 task, i64 thread) {
    const i64 b = task / p.group_points, o = task % p.group_points;
    T* columns = scratch + thread * scratch_size;
    load_weight(p, b / group_blocks * p.group_points + o, b, columns, columns + p.K * p.block);
    i64 low = 0, high = count;  // the chunk of the block's first unit
    while (high - low > 1) {
      const i64 middle = (low + high) / 2;
      (chunks[middle].unit <= b * p.K ? low : high) = middle;
    }
    for (i64 unit = b * p.K, end = unit + p.K; unit < end; low++) {
      const Chunk& chunk = chunks[low];
      const i64 stop = least(end, chunk.unit + chunk.count);
      i64 column = (unit - chunk.unit) * p.block;
      const i64 column_end = (stop - chunk.unit) * p.block;
      const bool last = stop == chunk.unit + chunk.count;
      const T* from = columns + (unit - b * p.K) * p.block;
      while (column < column_end) {
        const i64 j = column / width, some = least(column_end, (j + 1) * width) - column;
        T* to = packed + chunk.weights + (j * p.group_points + o) * width + column % width;
        memcpy(to, from, size_t(some) * sizeof(T));
        column += some, from += some, to += some;
        if (last && column == column_end)
          memset(to, 0, size_t((j + 1) * width - column) * sizeof(T));
      }
      unit = stop;
    }
  });
}
