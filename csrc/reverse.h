// Gradients of image, weight, offset and mask; the first is also the forward of
// deform_conv_transpose.
// Included by kernel.cpp inside the namespace of one instruction set.

// The channels are cut into parts. A thread takes one part of one image (or of some images, where
// they share a gradient of the weight) through all tiles, so gradients of image and weight need
// no atomics and no sample is visited twice.
template <class T, int ND>
struct Reverse {
  using P = Plan<T, ND>;
  static constexpr int N = P::N, Q = P::Q, Dots = P::Dots;

  const P p;
  const Call& call;
  int mode;
  Sampler<T> sampler;
  i64 part_blocks, parts;
  i64 flight;                  // images at a time
  i64 weight_slots;            // image n adds to gradient n % weight_slots of the weight
  i64 bands;                   // parts of the tiles, each with its own gradients
  i64 offset_sets, mask_sets;  // partial sums, where several parts share a group
  i64 chunk_count, chunk_columns, weights_size;  // chunks, most columns of one, packed weights
  i64 weight_size, image_size, offset_size, mask_size;
  i64 scratch_bytes, edge_size;
  T *packed, *weights, *grad_packed, *grad_weights, *edge;
  T *offset_buffer, *mask_buffer;
  Chunk* chunks;
  i64* part_chunks;  // first chunk of each part
  T* taints;         // of each thread, see Cells
  char* scratch;

  struct Scratch {
    Cells<T, ND> cells;
    T *grad_columns, *columns, *dots;
    T* by_point;  // [point of the group][pixel]
    T* by_panel;  // [panel][pixel][point of the panel]
    i64 loaded = -1;
    Scratch(Carver& c, const Reverse& r)
        : cells(c, r.p, r.p.K, true),
          grad_columns(c.take<T>(r.p.tile_pixels * r.chunk_columns)),
          columns(c.take<T>(r.p.tile_pixels * r.chunk_columns)),
          dots(c.take<T>(r.mode & kDotsWork ? r.p.K * r.p.table * Dots : 0)),
          by_point(c.take<T>(r.p.group_points * r.p.tile_pixels)),
          by_panel(c.take<T>(r.p.group_width * r.p.tile_pixels)) {}
  };

  // A gradient of the position sums over the channels of its group in as many parts as the sizes
  // say, whatever the number of threads.
  static i64 fixed_parts(const Call& c) { return most(2, least(8, c.image_channels / 64)); }

  explicit Reverse(const Call& c) : p(c, 4, fixed_parts(c)), call(c) {
    mode = (c.grad_weight.data ? kColumnsWork : 0) |
           (c.grad_offset.data || c.grad_mask.data ? kDotsWork : 0) |
           (c.grad_image.data ? kSpreadWork : 0);
    sampler = sampler_of<T, ND>(mode, p.lanes, p.vectors);
    weight_size = p.units() * p.block * (p.depthwise ? 1 : p.group_width);
    image_size = p.blocks * p.plane * p.block;
    offset_size = p.offset_groups * p.K * ND * p.P;
    mask_size = p.mask_groups * p.K * p.P;

    const i64 fitting = most(1, kFlightBytes / p.image_bytes());
    weight_slots = 1;
    if (mode & kColumnsWork)
      weight_slots = most(1, least(least(p.batch, 8), (16 << 20) / i64(weight_size * sizeof(T))));
    flight = least(p.batch, most(fitting, divide_up(p.threads, fixed_parts(c))));
    const i64 lines = mode & kColumnsWork ? least(weight_slots, flight) : flight;
    i64 wanted = fixed_parts(c);
    if (!(mode & kDotsWork))
      for (wanted = 1; wanted < p.blocks; wanted++)
        if (lines * wanted % p.threads == 0 || lines * wanted >= 4 * p.threads) break;
    part_blocks = divide_up(p.blocks, least(wanted, p.blocks));
    parts = divide_up(p.blocks, part_blocks);
    // Only where one image must occupy more threads than there are parts: here the sums of the
    // gradients of image and weight do depend on the number of threads.
    bands = least(p.tiles, divide_up(p.threads, lines * parts));
    offset_sets = sets(p.offset_groups), mask_sets = sets(p.mask_groups);

    cut_parts(nullptr, nullptr);
    edge_size = most(Field<T>::scratch_size, 2 * N * p.K * p.block);
    Carver measure{nullptr};
    Scratch(measure, *this);
    scratch_bytes = i64(measure.used);
  }

  i64 part_of(i64 b) const { return b / part_blocks; }
  i64 first_part(i64 group, i64 groups) const { return part_of(p.blocks / groups * group); }
  i64 last_part(i64 group, i64 groups) const {
    return part_of(p.blocks / groups * (group + 1) - 1);
  }
  i64 sets(i64 groups) const {
    i64 n = 0;
    for (i64 g = 0; g < groups; g++) n = most(n, last_part(g, groups) - first_part(g, groups) + 1);
    return n;
  }
  // Set 0 is the result itself where that has the computing type.
  bool direct(const Array& a) const { return a.dtype == DtypeOf<T>::value; }
  T* set_at(const Array& result, T* buffer, i64 size, i64 set, i64 first, i64 image) const {
    if (set == 0 && direct(result))
      return reinterpret_cast<T*>(result.data) + (first + image) * size;
    return buffer + ((set - direct(result)) * flight + image) * size;
  }

  void cut_parts(Chunk* to, i64* firsts) {
    chunk_count = chunk_columns = weights_size = 0;
    for (i64 part = 0; part < parts; part++) {
      if (firsts) firsts[part] = chunk_count;
      chunk_count += cut(p, part * part_blocks, least(p.blocks, (part + 1) * part_blocks),
                         to ? to + chunk_count : nullptr, &weights_size, &chunk_columns);
    }
    if (firsts) firsts[parts] = chunk_count;
  }

  Status run() {
    const i64 offset_buffers = call.grad_offset.data ? offset_sets - direct(call.grad_offset) : 0;
    const i64 mask_buffers = call.grad_mask.data ? mask_sets - direct(call.grad_mask) : 0;
    const bool reads_image = mode & (kColumnsWork | kDotsWork), spreads = mode & kSpreadWork;
    const bool expands = mode & (kDotsWork | kSpreadWork);
    const auto layout = [&](Carver c) {
      chunks = c.take<Chunk>(chunk_count);
      part_chunks = c.take<i64>(parts + 1);
      packed = c.take<T>(reads_image ? flight * image_size : 0);
      grad_packed = c.take<T>(spreads ? bands * flight * image_size : 0);
      weights = c.take<T>(expands ? weights_size : 0);
      grad_weights = c.take<T>(call.grad_weight.data ? weight_slots * bands * weight_size : 0);
      offset_buffer = c.take<T>(offset_buffers * flight * offset_size);
      mask_buffer = c.take<T>(mask_buffers * flight * mask_size);
      edge = c.take<T>(p.threads * edge_size);
      taints = c.take<T>(p.threads);
      scratch = c.take<char>(p.threads * scratch_bytes);
      return c.used;
    };
    char* memory = workspace_take(layout(Carver{nullptr}));
    if (!memory) return kNoMemory;
    layout(Carver{memory});
    cut_parts(chunks, part_chunks);
    memset(taints, 0, size_t(p.threads) * sizeof(T));

    if (expands && p.depthwise)
      pack_weight_by_channel(p, weights, edge, edge_size);
    else if (expands)
      pack_weight_by_column(p, chunks, chunk_count, weights, edge, edge_size);
    if (call.grad_weight.data)
      parallel(p.threads, weight_slots * bands * p.blocks, [&](i64 task, i64) {
        const i64 size = weight_size / p.blocks;
        memset(grad_weights + task * size, 0, size_t(size) * sizeof(T));
      });
    for (i64 first = 0; first < p.batch; first += flight) {
      const i64 images = least(flight, p.batch - first);
      if (reads_image) pack_image(p, first, images, packed, edge, edge_size);
      const i64 lines = mode & kColumnsWork ? least(weight_slots, images) : images;
      parallel(p.threads, lines * parts * bands, [&](i64 task, i64 thread) {
        const i64 band = task % bands, part = task / bands % parts;
        for (i64 image = task / bands / parts; image < images; image += lines)
          one_part(first, image, part, band, thread);
      });
      if (spreads) unpack_image(first, images);
      if (call.grad_offset.data)
        add_sets(call.grad_offset, offset_buffer, offset_size, p.offset_groups, offset_sets, first,
                 images);
      if (call.grad_mask.data)
        add_sets(call.grad_mask, mask_buffer, mask_size, p.mask_groups, mask_sets, first, images);
    }
    if (call.grad_weight.data) unpack_weight();
    const Status status = status_of(taints, p.threads);
    workspace_give();
    return status;
  }

  void one_part(i64 first, i64 image, i64 part, i64 band, i64 thread) {
    Carver carver{scratch + thread * scratch_bytes};
    Scratch s(carver, *this);
    const i64 block_begin = part * part_blocks;
    const i64 block_end = least(p.blocks, block_begin + part_blocks), size = p.plane * p.block;
    T* grad_image = grad_packed + (band * flight + image) * image_size;
    T* grad_weight = grad_weights + ((first + image) % weight_slots * bands + band) * weight_size;
    if (mode & kSpreadWork)
      memset(grad_image + block_begin * size, 0,
             size_t((block_end - block_begin) * size) * sizeof(T));
    const i64 tile_end = p.tiles * (band + 1) / bands;
    for (i64 t = p.tiles * band / bands; t < tile_end; t++) {
      const Tile tile = p.tile(first + image, t);
      s.cells.place(p, tile);
      s.loaded = -1;
      i64 current = -1;
      for (i64 i = part_chunks[part]; i < part_chunks[part + 1]; i++) {
        const Chunk& chunk = chunks[i];
        const i64 columns = chunk.count * p.block;
        load_points(s, tile, chunk.group, thread);
        if (mode & (kDotsWork | kSpreadWork)) {
          if (p.depthwise)
            scale(tile.count, p.block, chunk.count, s.grad_columns, chunk_columns,
                  weights + chunk.weights, s.by_panel);
          else
            multiply<T, kInColumns, false>(2, tile.count, chunk.panels, p.group_points, s.by_point,
                                           p.tile_pixels, weights + chunk.weights,
                                           p.group_points * 2 * N, s.grad_columns, chunk_columns,
                                           false);
        }
        for (i64 u = chunk.unit; u < chunk.unit + chunk.count; u++) {
          const i64 b = u / p.K, k = u % p.K, sample_group = p.sample_group(b);
          if (sample_group != current) {
            if (current >= 0) store_dots(s, tile, first, image, part, current);
            current = sample_group;
            for (i64 q = 0; q < p.K; q++) s.cells.template find<true>(p, tile, sample_group, q, q);
            if (mode & kDotsWork) memset(s.dots, 0, size_t(p.K * p.table * Dots) * sizeof(T));
          }
          const i64 column = (u - chunk.unit) * p.block;
          sampler({tile.count, packed + (image * p.blocks + b) * size, grad_image + b * size,
                   p.steps, s.cells.index + k * p.table, s.cells.weight + k * Q * p.table,
                   s.grad_columns + column, s.columns + column, chunk_columns,
                   s.dots + k * p.table * Dots});
        }
        if (mode & kColumnsWork) {
          if (p.depthwise)
            add_products(tile.count, p.block, chunk.count, s.columns, chunk_columns,
                         grad_weight + chunk.unit * p.block, s.by_panel);
          else
            multiply<T, kInColumns, true>(p.panel_vectors, columns, p.panels, tile.count, s.columns,
                                          chunk_columns, s.by_panel, p.tile_pixels * p.panel,
                                          grad_weight + chunk.unit * p.block * p.group_width,
                                          p.group_width, true);
        }
      }
      store_dots(s, tile, first, image, part, current);
    }
    taints[thread] += s.cells.tainted();
  }

  void load_points(Scratch& s, const Tile& tile, i64 group, i64 thread) const {
    if (s.loaded == group) return;
    s.loaded = group;
    const Field<T> points{call.points, p.point_channels, p.P};
    const i64 point = p.group_point(group), count = p.points_in(group), step = p.tile_pixels;
    for (i64 i = 0; i < tile.segments; i++) {
      const i64 pixel = tile.first + i * tile.step;
      T* to = s.by_point + i * tile.length;
      if (call.points.last) {
        T* rows = edge + thread * edge_size;
        for (i64 o = 0; o < count; o += 64) {
          const i64 some = least(64, count - o);
          points.load(tile.image, point + o, some, pixel, tile.length, rows, some, nullptr);
          transpose(rows, some, to + o * step, step, some, tile.length);
        }
      } else {
        for (i64 o = 0; o < count; o++)
          read(call.points, points.at(tile.image, point + o, pixel), tile.length, to + o * step);
      }
    }
    if (!(mode & kColumnsWork || p.depthwise)) return;
    for (i64 j = 0; j < p.panels; j++) {
      const i64 some = least(p.panel, count - j * p.panel);
      T* to = s.by_panel + j * step * p.panel;
      if (some < p.panel) memset(to, 0, size_t(tile.count * p.panel) * sizeof(T));
      transpose(s.by_point + j * p.panel * step, step, to, p.panel, tile.count, some);
    }
  }

  // Derivatives by position and mask of one sample group, from its sums of grad_column times
  // corner.
  void store_dots(Scratch& s, const Tile& tile, i64 first, i64 image, i64 part,
                  i64 sample_group) const {
    if (!(mode & kDotsWork)) return;
    using L = Lanes<T, N>;
    using V = typename L::V;
    const i64 first_group = p.sample_group(part * part_blocks);  // of this part
    // Where the planes of this group's gradient lie, and whether this part has been there.
    const auto planes = [&](const Array& result, T* buffer, i64 size, i64 groups, i64 group,
                            bool* fresh) -> T* {
      if (!result.data) return nullptr;
      *fresh = sample_group == most(first_group, p.sample_groups / groups * group);
      const i64 set = part - first_part(group, groups);
      return set_at(result, buffer, size, set, first, image) + group * (size / groups);
    };
    bool fresh_offset = false, fresh_mask = false;
    T* offsets = planes(call.grad_offset, offset_buffer, offset_size, p.offset_groups,
                        p.offset_group(sample_group), &fresh_offset);
    T* masks = planes(call.grad_mask, mask_buffer, mask_size, p.mask_groups,
                      p.mask_group(sample_group), &fresh_mask);
    const typename L::I outside = L::splat_index(i32(p.outside()));
    V tainted = L::zero();
    for (i64 k = 0; k < p.K; k++)
      for (i64 i = 0; i < tile.segments; i++)
        for (i64 c0 = 0; c0 < tile.length; c0 += N) {
          const i64 c = tile.length >= N ? least(c0, tile.length - N) : 0;
          const i64 m = k * p.table + i * tile.length + c;
          const i64 pixel = tile.first + i * tile.step + c;
          T rows[Dots * N];
          transpose_by<T, 4>(s.dots + m * Dots, Dots, rows, N, Dots, N);
          V value[Q], slope[ND][Q];
          UNROLL
          for (int q = 0; q < Q; q++) value[q] = L::load(rows + q * N);
          // Interpolate axis by axis; the slope of an axis is interpolated along the later ones.
          UNROLL
          for (int v = 0; v < ND; v++) {
            const int half = Q >> (v + 1);
            const i64 at = (k * ND + v) * p.table + i * tile.length + c;
            const V part_v = L::load(s.cells.fraction + at);
            UNROLL
            for (int q = 0; q < half; q++) {
              UNROLL
              for (int w = 0; w < v; w++)
                slope[w][q] = slope[w][q] + part_v * (slope[w][q + half] - slope[w][q]);
              slope[v][q] = value[q + half] - value[q];
              value[q] = value[q] + part_v * slope[v][q];
            }
          }
          const auto store = [&](T* to, V result, bool fresh) {
            tainted = tainted + result * L::zero();
            if (c == c0 && tile.length >= N) {
              L::store(to, fresh ? result : L::load(to) + result);
            } else {
              T lane[N];
              L::store(lane, result);
              for (i64 l = c0 - c; l < least(N, tile.length - c); l++)
                to[l] = fresh ? lane[l] : to[l] + lane[l];
            }
          };
          if (offsets) {
            // A position outside has no slope; its mask has the gradient of any factor of 0.
            const auto valid = L::mask(L::load_index(s.cells.index + m) != outside);
            const V mask = L::load(s.cells.mask + m);
            UNROLL
            for (int v = 0; v < ND; v++)
              store(offsets + (k * ND + v) * p.P + pixel,
                    L::select(valid, slope[v][0] * mask, L::zero()), fresh_offset);
          }
          if (masks) store(masks + k * p.P + pixel, value[0], fresh_mask);
        }
    L::store(s.cells.taint, L::load(s.cells.taint) + tainted);
  }

  void add_sets(const Array& result, T* buffer, i64 size, i64 groups, i64 sets, i64 first,
                i64 images) const {
    if (sets == 1 && direct(result)) return;
    const i64 planes = size / p.P;
    parallel(p.threads, images * planes, [&](i64 task, i64) {
      const i64 image = task / planes, plane = task % planes, group = plane / (planes / groups);
      const i64 count = last_part(group, groups) - first_part(group, groups) + 1;
      for (i64 x = 0; x < p.P; x += kPiece) {
        const i64 n = least(kPiece, p.P - x), at = plane * p.P + x;
        T sum[kPiece];
        memcpy(sum, set_at(result, buffer, size, 0, first, image) + at, size_t(n) * sizeof(T));
        for (i64 set = 1; set < count; set++) {
          const T* more = set_at(result, buffer, size, set, first, image) + at;
          for (i64 i = 0; i < n; i++) sum[i] += more[i];
        }
        write(result, (first + image) * size + at, n, sum);
      }
    });
  }

  void unpack_image(i64 first, i64 images) const {
    const Field<T> image{call.grad_image, p.image_channels, p.pixels};
    const i64 width = p.image_size[ND - 1], rows = p.pixels / width;
    parallel(p.threads, images * p.blocks * rows, [&](i64 task, i64 thread) {
      const i64 n = task / rows / p.blocks, b = task / rows % p.blocks;
      i64 rest = task % rows, pixel = 1;
      for (int v = ND - 2; v >= 0; v--) {
        pixel += (rest % p.image_size[v] + 1) * p.axis_step(v);
        rest /= p.image_size[v];
      }
      T* from = grad_packed + n * image_size + (b * p.plane + pixel) * p.block;
      for (i64 band = 1; band < bands; band++) {
        const T* more = from + band * flight * image_size;
        for (i64 i = 0; i < width * p.block; i++) from[i] += more[i];
      }
      const i64 count = p.block_channels(b);
      if (call.bias.data) {
        T bias[4 * N];
        read(call.bias, p.channel(b), count, bias);
        for (i64 x = 0; x < width; x++)
          for (i64 c = 0; c < count; c++) from[x * p.block + c] += bias[c];
      }
      for (i64 x = 0; x < width; x += kPiece)
        image.store(first + n, p.channel(b), count, task % rows * width + x,
                    least(kPiece, width - x), from + x * p.block, p.block,
                    edge + thread * edge_size);
    });
  }

  void unpack_weight() const {
    const i64 copies = weight_slots * bands, group_blocks = p.blocks / p.groups;
    if (p.depthwise) {
      parallel(p.threads, p.blocks, [&](i64 b, i64 thread) {
        const i64 size = p.K * p.block, count = p.block_channels(b);
        T* sums = grad_weights + b * size;
        T* rows = edge + thread * edge_size;
        for (i64 copy = 1; copy < copies; copy++)
          for (i64 i = 0; i < size; i++) sums[i] += sums[copy * weight_size + i];
        transpose(sums, p.block, rows, p.K, count, p.K);
        write(call.grad_weight, p.channel(b) * p.K, count * p.K, rows);
      });
      return;
    }
    const i64 size = p.K * p.block, strips = divide_up(p.group_points, N);
    parallel(p.threads, p.blocks * strips, [&](i64 task, i64 thread) {
      const i64 b = task / strips, o = task % strips * N, some = least(N, p.group_points - o);
      const i64 count = p.block_channels(b), channel = p.channel(b) % p.group_channels;
      T* sums = edge + thread * edge_size;  // [point][kernel point][channel]
      T* more = sums + N * size;
      for (i64 copy = 0; copy < copies; copy++) {
        const T* from = grad_weights + copy * weight_size + b * size * p.group_width + o;
        transpose(from, p.group_width, copy ? more : sums, size, some, size);
        if (copy)
          for (i64 i = 0; i < some * size; i++) sums[i] += more[i];
      }
      for (i64 i = 0; i < some; i++) {
        transpose(sums + i * size, p.block, more, p.K, count, p.K);
        write(call.grad_weight,
              ((b / group_blocks * p.group_points + o + i) * p.group_channels + channel) * p.K,
              count * p.K, more);
      }
    });
  }
};
