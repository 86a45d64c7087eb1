// Gradients of image, weight, offset and mask; the first is also the forward of
// deform_conv_transpose.
// Included by kernel.cpp inside the namespace of one instruction set.

// The channels are cut into parts. A thread takes one part of one image (or of several images,
// where they share a gradient of the weight) through all tiles. So gradients of image and weight
// need no atomics, and no sample is visited twice. Where there are more threads than that, each
// takes a band of the tiles, and has gradients of image and weight of its own, which are added up
// in the end. Of its image gradient, a band clears only the slices that its samples touch, when
// they first do, and only those are added up.
template <class T, int ND>
struct Reverse {
  using P = Plan<T, ND>;
  static constexpr int N = P::N, Q = P::Q, Dots = P::Dots;

  // Slices [begin, end) of the slowest axis of a packed plane.
  struct Touched {
    i64 begin, end;
  };

  P p;
  const Call& call;
  int mode;
  Sampler<T> sampler;
  i64 part_blocks, parts;
  i64 flight;                  // images packed at a time
  i64 weight_slots;            // image n adds to the gradient n % weight_slots of the weight
  i64 bands;                   // parts of the tiles, each with gradients of its own
  i64 offset_sets, mask_sets;  // partial sums of a group, where several parts share it
  i64 chunk_count, chunk_columns, weights_size;  // chunks, most columns of one, words of weights
  i64 weight_size, image_size, packed_size, offset_size, mask_size;
  i64 scratch_bytes, edge_size;
  T *packed, *weights, *grad_packed, *grad_weights, *edge;
  T *offset_buffer, *mask_buffer;
  Touched* touched;  // [band][image][part]
  Chunk* chunks;
  i64* part_chunks;  // first chunk of each part
  T* taints;         // one for each thread, see Cells
  char* scratch;

  struct Scratch {
    Cells<T, ND> cells;
    T *grad_columns, *columns, *dots;
    T* by_point;  // [point of the group][pixel], in words of kPerWord pixels
    T* by_panel;  // [panel][pixel][point of the panel]; in pairs [pixel][word of the points]
    i64 loaded = -1;
    Scratch(Carver& c, const Reverse& r)
        : cells(c, r.p, r.p.K, true),
          grad_columns(c.take<T>(r.call.weight.data ? r.p.tile_room * r.chunk_columns : 0)),
          columns(c.take<T>(r.p.tile_room / kPerWord * r.chunk_columns)),
          dots(c.take<T>(r.mode & kDotsWork ? r.p.K * r.p.table * Dots : 0)),
          by_point(c.take<T>(r.p.depthwise ? 0 : r.p.point_words * r.p.tile_room)),
          by_panel(c.take<T>((kPairs ? r.p.point_words : r.p.group_width) * r.p.tile_room)) {}
  };

  // Into how many parts to cut the channels. A part has at least 64 channels. For many threads it
  // may have 32, or fewer if it then shares no offsets with another: with fewer parts there would
  // be more bands, which need gradients of their own.
  static i64 wanted_parts(const Call& c) {
    const i64 least_parts = most(2, least(8, c.image_channels / 64));
    const i64 groups = most(c.offset_groups, c.mask_groups);
    const i64 most_parts = most(c.image_channels / 32, least(groups, c.image_channels / 8));
    return most(least_parts, least(P::threads_for(c), most_parts));
  }

  explicit Reverse(const Call& c) : p(c, 4, wanted_parts(c)), call(c) {
    mode = (c.grad_weight.data ? kColumnsWork : 0) |
           (c.grad_offset.data || c.grad_mask.data ? kDotsWork : 0) |
           (c.grad_image.data ? kSpreadWork : 0);
    sampler = sampler_of<T, ND>(mode, p.lanes, p.vectors, p.planar);
    weight_size = p.units() * p.depth * (p.depthwise ? 1 : p.group_width);
    image_size = p.blocks * p.plane * p.block, packed_size = p.blocks * p.plane * p.words;
    offset_size = p.offset_groups * p.K * ND * p.P;
    mask_size = p.mask_groups * p.K * p.P;

    const i64 fitting = most(1, kFlightBytes / p.image_bytes());
    weight_slots = 1;
    if (mode & kColumnsWork)
      weight_slots = most(1, least(least(p.batch, 8), (16 << 20) / i64(weight_size * sizeof(T))));
    flight = least(p.batch, most(fitting, divide_up(p.threads, wanted_parts(c))));
    const i64 lines = mode & kColumnsWork ? least(weight_slots, flight) : flight;
    i64 wanted = wanted_parts(c);
    if (!(mode & kDotsWork))
      for (wanted = 1; wanted < p.blocks; wanted++)
        if (lines * wanted % p.threads == 0 || lines * wanted >= 4 * p.threads) break;
    part_blocks = divide_up(p.blocks, least(wanted, p.blocks));
    parts = divide_up(p.blocks, part_blocks);
    // There are several bands only where one image must occupy more threads than it has parts. To
    // clear a band's gradients and to add them up takes about a fiftieth of the whole time.
    const i64 tasks = lines * parts, fewest = divide_up(p.threads, tasks);
    p.share_tiles(1, fewest, 1);
    i64 least_cost = 0;
    for (i64 n = 1; n <= least(p.tiles, 2 * fewest); n++) {
      const i64 rounds = divide_up(tasks * n, p.threads) * divide_up(p.tiles, n);
      const i64 cost = 50 * p.threads * rounds + n * tasks * p.tiles;
      if (least_cost == 0 || cost < least_cost) bands = n, least_cost = cost;
    }
    offset_sets = sets(p.offset_groups), mask_sets = sets(p.mask_groups);

    cut_parts(nullptr, nullptr);
    if (kPairs) weight_size = 2 * weights_size;
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
  // Whether set 0 is the result itself, which must have the computing type and channels first.
  bool direct(const Array& a) const { return a.dtype == DtypeOf<T>::value && !a.last; }
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
    const bool expands = call.weight.data && mode & (kDotsWork | kSpreadWork);
    const auto layout = [&](Carver c) {
      chunks = c.take<Chunk>(chunk_count);
      part_chunks = c.take<i64>(parts + 1);
      packed = c.take<T>(reads_image ? flight * packed_size : 0);
      grad_packed = c.take<T>(spreads ? bands * flight * image_size : 0);
      weights = c.take<T>(expands ? weights_size : 0);
      grad_weights = c.take<T>(call.grad_weight.data ? weight_slots * bands * weight_size : 0);
      offset_buffer = c.take<T>(offset_buffers * flight * offset_size);
      mask_buffer = c.take<T>(mask_buffers * flight * mask_size);
      touched = c.take<Touched>(bands * flight * parts);
      edge = c.take<T>(p.team * edge_size);
      taints = c.take<T>(p.team);
      scratch = c.take<char>(p.team * scratch_bytes);
      return c.used;
    };
    char* memory = workspace_take(layout(Carver{nullptr}));
    if (!memory) return kNoMemory;
    layout(Carver{memory});
    cut_parts(chunks, part_chunks);
    memset(taints, 0, size_t(p.team) * sizeof(T));

    const i64 weight_tasks = !expands ? 0 : p.depthwise ? p.blocks : p.blocks * p.point_words;
    const i64 offset_tasks = set_tasks(call.grad_offset, offset_size, offset_sets);
    const i64 mask_tasks = set_tasks(call.grad_mask, mask_size, mask_sets);
    const Array results[3] = {call.grad_image, call.grad_offset, call.grad_mask};
    const i64 pages[3] = {
        touch_tasks(results[0], p.batch * p.image_channels * p.pixels, p.team),
        touch_tasks(results[1], p.batch * offset_size, p.team),
        touch_tasks(results[2], p.batch * mask_size, p.team),
    };
    const i64 once = pages[0] + pages[1] + pages[2] + weight_tasks;
    together(p.team, [&](const Worker& worker) {
      T* spare = edge + worker.thread * edge_size;
      for (i64 first = 0; first < p.batch; first += flight) {
        const i64 images = least(flight, p.batch - first);
        const i64 before = first == 0 ? once : 0;
        worker.share(before + (reads_image ? pack_image_tasks(p, images) : 0), [&](i64 task) {
          if (task >= before) return pack_image(p, first, task - before, packed, spare);
          for (int i = 0; i < 3; i++) {
            if (task < pages[i]) return touch(results[i], task);
            task -= pages[i];
          }
          if (p.depthwise)
            pack_weight_by_channel(p, task, weights, spare);
          else if (p.planar)
            pack_weight_by_plane(p, task, weights, spare);
          else
            pack_weight_by_column(p, chunks, chunk_count, task, weights, spare);
        });
        const i64 lines = mode & kColumnsWork ? least(weight_slots, images) : images;
        worker.share(lines * parts * bands, [&](i64 task) {
          const i64 band = task % bands, part = task / bands % parts;
          for (i64 image = task / bands / parts; image < images; image += lines)
            one_part(first, image, part, band, worker.thread);
        });
        // These are three kinds of tasks in one share, so that no thread waits between the kinds.
        const i64 last =
            first + images == p.batch && call.grad_weight.data ? unpack_weight_tasks() : 0;
        const i64 rows = spreads ? unpack_image_tasks(images) : 0;
        worker.share(last + rows + images * (offset_tasks + mask_tasks), [&](i64 task) {
          if (task < last) return unpack_weight(task, spare);
          task -= last;
          if (task < rows) return unpack_image(first, task, spare);
          task -= rows;
          if (task < images * offset_tasks)
            return add_sets(call.grad_offset, offset_buffer, offset_size, p.offset_groups, first,
                            task, spare);
          add_sets(call.grad_mask, mask_buffer, mask_size, p.mask_groups, first,
                   task - images * offset_tasks, spare);
        });
      }
    });
    const Status status = status_of(taints, p.team);
    workspace_give(p.team);
    return status;
  }

  void one_part(i64 first, i64 image, i64 part, i64 band, i64 thread) {
    Carver carver{scratch + thread * scratch_bytes};
    Scratch s(carver, *this);
    const i64 block_begin = part * part_blocks;
    const i64 block_end = least(p.blocks, block_begin + part_blocks), size = p.plane * p.block;
    T* image_packed = packed + image * packed_size;
    T* grad_image = grad_packed + (band * flight + image) * image_size;
    T* grad_weight = grad_weights + ((first + image) % weight_slots * bands + band) * weight_size;
    Touched& slices = touched[(band * flight + image) * parts + part];
    slices = {0, 0};
    const i64 tile_end = p.tiles * (band + 1) / bands;
    const i64 group_columns = p.units() / p.groups * p.depth;  // of a weight group, used if planar
    for (i64 t = p.tiles * band / bands; t < tile_end; t++) {
      const Tile tile = p.tile(first + image, t);
      const bool fresh = first + image < weight_slots && t == p.tiles * band / bands;
      s.cells.place(p, tile);
      s.loaded = -1;
      // The sample group whose cells have been found, and the first block of it in this part.
      i64 current = -1, block = -1;
      for (i64 i = part_chunks[part]; i < part_chunks[part + 1]; i++) {
        const Chunk& chunk = chunks[i];
        const i64 columns = chunk.count * p.depth, step = p.planar ? p.tile_room : chunk_columns;
        load_points(s, tile, chunk.group, thread);
        if (mode & (kDotsWork | kSpreadWork)) {
          if constexpr (kPairs)
            multiply_pairs(call.tiles, 2, tile.count, chunk.panels, p.point_words, s.by_panel,
                           p.point_words, {weights + chunk.weights, 2 * N, 2 * N * p.point_words},
                           {s.grad_columns, chunk_columns, 2 * N}, false);
          else if (p.depthwise && call.weight.data)
            scale(tile.count, p.block, chunk.count, s.grad_columns, chunk_columns,
                  weights + chunk.weights, s.by_panel);
          else if (p.planar)
            multiply<T, true, false>(
                2, columns, divide_up(tile.count, 2 * N), p.group_points,
                weights + chunk.group * (p.group_points - 1) * group_columns + chunk.unit * p.run,
                group_columns, s.by_point, step, 2 * N, s.grad_columns, step, false);
          else if (!p.depthwise)
            multiply<T, true, false>(2, tile.count, chunk.panels, p.group_points, s.by_point,
                                     p.tile_room, weights + chunk.weights, 2 * N,
                                     p.group_points * 2 * N, s.grad_columns, chunk_columns, false);
        }
        for (i64 u = chunk.unit; u < chunk.unit + chunk.count; u++) {
          const i64 b = u / p.K, k = u % p.K, sample_group = p.sample_group(b);
          if (sample_group != current) {
            if (current >= 0) store_dots(s, tile, first, image, part, current);
            current = sample_group, block = b;
            for (i64 q = 0; q < p.K; q++) s.cells.template find<true>(p, tile, sample_group, q, q);
            if (mode & kSpreadWork) {
              const Touched more = slices_of(s.cells, tile.count);
              for (i64 c = block_begin; c < block_end; c++)
                clear(grad_image + c * size, slices, more);
              slices = join(slices, more);
            }
            if (mode & kDotsWork && !p.planar)
              memset(s.dots, 0, size_t(p.K * p.table * Dots) * sizeof(T));
          }
          const i64 column = (u - chunk.unit) * (p.planar ? p.run * step : p.block);
          // Without a weight the points themselves are the gradients of every unit's columns.
          const bool ones = !call.weight.data;
          sampler({tile.count, image_packed + b * p.plane * p.words, grad_image + b * size, p.steps,
                   s.cells.index + k * p.table, s.cells.weight + k * Q * p.table,
                   ones ? s.by_panel : s.grad_columns + column, s.columns + column,
                   ones ? p.block : step, s.dots + k * p.table * Dots, p.run, p.table, b == block});
        }
        if (mode & kColumnsWork) {
          if constexpr (kPairs) {
            const i64 rows = (tile.count + 1) / 2, inner = round_up(rows, kTileWords);
            memset(s.columns + rows * chunk_columns, 0,
                   size_t((inner - rows) * chunk_columns) * sizeof(T));
            multiply_pairs(call.tiles, 2, p.group_points, chunk.panels, inner, s.by_point,
                           p.tile_room / 2, {s.columns, chunk_columns, 2 * N},
                           {grad_weight + 2 * chunk.weights, 2 * N, 4 * N * p.point_words}, !fresh);
          } else if (p.depthwise) {
            if (fresh) memset(grad_weight + chunk.unit * p.block, 0, size_t(columns) * sizeof(T));
            add_products(tile.count, p.block, chunk.count, s.columns, chunk_columns,
                         grad_weight + chunk.unit * p.block, s.by_panel);
          } else if (p.planar) {
            multiply<T, false, true>(p.panel_vectors, columns, p.panels, tile.count, s.columns,
                                     step, s.by_panel, p.panel, p.tile_room * p.panel,
                                     grad_weight + chunk.unit * p.run * p.group_width,
                                     p.group_width, !fresh);
          } else {
            multiply<T, true, true>(p.panel_vectors, columns, p.panels, tile.count, s.columns,
                                    chunk_columns, s.by_panel, p.panel, p.tile_room * p.panel,
                                    grad_weight + chunk.unit * p.block * p.group_width,
                                    p.group_width, !fresh);
          }
        }
      }
      store_dots(s, tile, first, image, part, current);
    }
    taints[thread] += s.cells.tainted();
  }

  // The slices that the samples of a tile touch. Those outside are left out, since they touch a
  // part of the border that nobody reads.
  Touched slices_of(const Cells<T, ND>& cells, i64 count) const {
    const i32 outside = i32(p.outside());
    i32 low = outside, high = -1;
    for (i64 k = 0; k < p.K; k++) {
      const i32* index = cells.index + k * p.table;
      for (i64 m = 0; m < count; m++) {
        // Without a branch, so that the compiler makes vectors of it.
        const i32 at = index[m], inside = at == outside ? -1 : at;
        low = at < low ? at : low;
        high = inside > high ? inside : high;
      }
    }
    if (high < 0) return {0, 0};
    return {low / p.axis_step(0), high / p.axis_step(0) + 2};
  }

  static Touched join(Touched a, Touched b) {
    if (a.begin == a.end || b.begin == b.end) return a.begin == a.end ? b : a;
    return {least(a.begin, b.begin), most(a.end, b.end)};
  }

  // Clear the slices of a block from the first to the last of `had` and `more`, but not those of
  // `had`, which hold sums already.
  void clear(T* block, Touched had, Touched more) const {
    const Touched all = join(had, more);
    const i64 slice = p.axis_step(0) * p.block;
    if (had.begin == had.end) had = {all.end, all.end};
    memset(block + all.begin * slice, 0, size_t((had.begin - all.begin) * slice) * sizeof(T));
    memset(block + had.end * slice, 0, size_t((all.end - had.end) * slice) * sizeof(T));
  }

  void load_points(Scratch& s, const Tile& tile, i64 group, i64 thread) const {
    if (s.loaded == group) return;
    s.loaded = group;
    if constexpr (kPairs) return load_point_pairs(s, tile, group, thread);
    const Field<T> points{call.points, p.point_channels, p.P};
    const i64 point = p.group_point(group), count = p.points_in(group), step = p.tile_room;
    if (p.depthwise) {
      if (count < p.block) memset(s.by_panel, 0, size_t(tile.count * p.block) * sizeof(T));
      for (i64 i = 0; i < tile.segments; i++)
        points.load(tile.image, point, count, tile.first + i * tile.step, tile.length,
                    s.by_panel + i * tile.length * p.block, p.block, edge + thread * edge_size);
      return;
    }
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
    if (p.planar)
      for (i64 o = 0; o < count; o++)
        for (i64 m = tile.count; m < round_up(tile.count, 2 * N); m++) s.by_point[o * step + m] = 0;
    if (!(mode & kColumnsWork)) return;
    for (i64 j = 0; j < p.panels; j++) {
      const i64 some = least(p.panel, count - j * p.panel);
      T* to = s.by_panel + j * step * p.panel;
      if (some < p.panel) memset(to, 0, size_t(tile.count * p.panel) * sizeof(T));
      transpose(s.by_point + j * p.panel * step, step, to, p.panel, tile.count, some);
    }
  }

  void load_point_pairs(Scratch& s, const Tile& tile, i64 group, i64 thread) const {
    const Field<T> points{call.points, p.point_channels, p.P};
    const Array rows{reinterpret_cast<char*>(s.by_point), kBFloat16, false};
    T *scratch = edge + thread * edge_size, *more = scratch + kTileNumbers * kPiece;
    for (i64 o = 0; o < p.group_points; o += kTileNumbers) {
      const i64 some = least(kTileNumbers, p.group_points - o), point = p.group_point(group) + o;
      for (i64 i = 0; i < tile.segments; i++) {
        const i64 pixel = tile.first + i * tile.step, n = tile.length;
        if (mode & (kDotsWork | kSpreadWork))
          load_pairs(points, tile.image, point, some, pixel, n, kTileWords, kTileWords,
                     s.by_panel + i * n * p.point_words + o / 2, p.point_words, scratch);
        if (!(mode & kColumnsWork)) continue;
        if (call.points.last) {
          points.load(tile.image, point, some, pixel, n, scratch, some, nullptr);
          transpose(scratch, some, more, n, some, n);
        }
        for (i64 c = 0; c < some; c++) {
          const i64 at = (o + c) * p.tile_room + i * n;
          if (call.points.last)
            write(rows, at, n, more + c * n);
          else
            memcpy(rows.data + at * 2,
                   call.points.data + points.at(tile.image, point + c, pixel) * 2, size_t(n) * 2);
        }
      }
      for (i64 c = 0; c < some; c++)
        memset(rows.data + ((o + c) * p.tile_room + tile.count) * 2, 0,
               size_t(round_up(tile.count, kTileNumbers) - tile.count) * 2);
    }
  }

  // Make the gradients by offset and mask of one sample group, from its dots, the sums of
  // grad_column times corner.
  void store_dots(Scratch& s, const Tile& tile, i64 first, i64 image, i64 part,
                  i64 sample_group) const {
    if (!(mode & kDotsWork)) return;
    using L = Lanes<T, N>;
    using V = typename L::V;
    const i64 first_group = p.sample_group(part * part_blocks);  // the first one of this part
    // Where the planes of this group's gradient lie. *fresh is whether this part has not yet
    // written there, and so must store and not add.
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
    if (p.planar)  // The last vector may go beyond the tile, and reads zeros there.
      for (i64 k = 0; k < p.K; k++)
        for (int q = 0; q < Q; q++)
          L::store(s.dots + (k * Dots + q) * p.table + tile.count, L::zero());
    for (i64 k = 0; k < p.K; k++) {
      T* slopes[ND] = {};  // by axis, the planes of this kernel point
      T* by_mask = masks ? masks + p.given_point(k) * p.P : nullptr;
      for (int v = 0; v < ND && offsets; v++)
        slopes[v] = offsets + (p.given_point(k) * ND + p.given_axis(v)) * p.P;
      for (i64 i = 0; i < tile.segments; i++)
        for (i64 c0 = 0; c0 < tile.length; c0 += N) {
          const i64 c = tile.length >= N ? least(c0, tile.length - N) : 0;
          const i64 m = k * p.table + i * tile.length + c;
          const i64 pixel = tile.first + i * tile.step + c;
          T rows[Dots * N];
          const T* dots = rows;
          if (p.planar)
            dots = s.dots + k * p.table * Dots + i * tile.length + c;
          else
            transpose_by<T, 4>(s.dots + m * Dots, Dots, rows, N, Dots, N);
          V value[Q], slope[ND][Q];
          UNROLL
          for (int q = 0; q < Q; q++) value[q] = L::load(dots + q * (p.planar ? p.table : N));
          // Interpolate along one axis after the other. The slope along an axis is interpolated
          // along the axes that come later.
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
            // A position outside has no slope. The gradient of its mask needs no such care: it is
            // the sample, which is 0 there.
            const auto valid = L::mask(L::load_index(s.cells.index + m) != outside);
            const V mask = L::load(s.cells.mask + m);
            UNROLL
            for (int v = 0; v < ND; v++)
              store(slopes[v] + pixel, L::select(valid, slope[v][0] * mask, L::zero()),
                    fresh_offset);
          }
          if (masks) store(by_mask + pixel, value[0], fresh_mask);
        }
    }
    L::store(s.cells.taint, L::load(s.cells.taint) + tainted);
  }

  // How many tasks of add_sets there are for each image.
  i64 set_tasks(const Array& result, i64 size, i64 sets) const {
    if (!result.data || (sets == 1 && direct(result))) return 0;
    return result.last ? divide_up(p.P, kPiece) : size / p.P;
  }

  // A plane of the result, or a piece of all planes where they lie channels last.
  void add_sets(const Array& result, T* buffer, i64 size, i64 groups, i64 first, i64 task,
                T* spare) const {
    const i64 planes = size / p.P;
    const auto add = [&](i64 image, i64 plane, i64 x, i64 n) {
      const i64 group = plane / (planes / groups), at = plane * p.P + x;
      const i64 count = last_part(group, groups) - first_part(group, groups) + 1;
      T* sum = set_at(result, buffer, size, 0, first, image) + at;
      for (i64 set = 1; set < count; set++) {
        const T* more = set_at(result, buffer, size, set, first, image) + at;
        for (i64 i = 0; i < n; i++) sum[i] += more[i];
      }
      return sum;
    };
    if (result.last) {
      const i64 pieces = divide_up(p.P, kPiece), image = task / pieces;
      const i64 x = task % pieces * kPiece, n = least(kPiece, p.P - x);
      for (i64 plane = 0; plane < planes; plane++) add(image, plane, x, n);
      store_planes(Field<T>{result, planes, p.P}, first + image, 0, planes, x, n,
                   set_at(result, buffer, size, 0, first, image) + x, p.P, spare);
      return;
    }
    const i64 image = task / planes, plane = task % planes;
    for (i64 x = 0; x < p.P; x += kPiece) {
      const i64 n = least(kPiece, p.P - x);
      const T* sum = add(image, plane, x, n);
      if (!direct(result)) write(result, (first + image) * size + plane * p.P + x, n, sum);
    }
  }

  i64 unpack_image_tasks(i64 images) const {
    const i64 width = p.image_size[ND - 1];
    return images * p.blocks * (p.pixels / width) * divide_up(width, kPiece);
  }

  void unpack_image(i64 first, i64 task, T* spare) const {
    const Field<T> image{call.grad_image, p.image_channels, p.pixels};
    const i64 width = p.image_size[ND - 1], rows = p.pixels / width;
    const i64 pieces = divide_up(width, kPiece), x = task % pieces * kPiece;
    const i64 some = least(kPiece, width - x);
    task /= pieces;
    const i64 n = task / rows / p.blocks, b = task / rows % p.blocks, row = task % rows;
    i64 slice = 0, pixel = x + 1;
    for (i64 v = ND - 2, rest = row; v >= 0; v--) {
      slice = rest % p.image_size[v] + 1;
      pixel += slice * p.axis_step(v);
      rest /= p.image_size[v];
    }
    T* sums = grad_packed + n * image_size + (b * p.plane + pixel) * p.block;
    for (i64 band = 0; band < bands; band++) {
      // Only the pixels [begin, end) of these were touched.
      const Touched& t = touched[(band * flight + n) * parts + part_of(b)];
      i64 begin = 0, end = t.begin <= slice && slice < t.end ? some : 0;
      if (ND == 1) {
        begin = most(0, least(some, t.begin - pixel));
        end = most(begin, least(some, t.end - pixel));
      }
      begin *= p.block, end *= p.block;
      if (band == 0) {
        memset(sums, 0, size_t(begin) * sizeof(T));
        memset(sums + end, 0, size_t(some * p.block - end) * sizeof(T));
      } else {
        const T* more = sums + band * flight * image_size;
        for (i64 i = begin; i < end; i++) sums[i] += more[i];
      }
    }
    const i64 count = p.block_channels(b);
    if (call.bias.data) {
      T bias[4 * N];
      read(call.bias, p.channel(b), count, bias);
      for (i64 m = 0; m < some; m++)
        for (i64 c = 0; c < count; c++) sums[m * p.block + c] += bias[c];
    }
    if (p.block == 4 && !image.array.last)
      store_four(image, first + n, p.channel(b), count, row * width + x, some, sums, spare);
    else
      image.store(first + n, p.channel(b), count, row * width + x, some, sums, p.block, spare);
  }

  i64 unpack_weight_tasks() const {
    return p.depthwise ? p.blocks : p.blocks * divide_up(p.group_points, N);
  }

  void unpack_weight(i64 task, T* spare) const {
    const i64 copies = weight_slots * bands, group_blocks = p.blocks / p.groups;
    if (p.depthwise) {
      const i64 b = task, size = p.K * p.block, count = p.block_channels(b);
      T* sums = grad_weights + b * size;
      for (i64 copy = 1; copy < copies; copy++)
        for (i64 i = 0; i < size; i++) sums[i] += sums[copy * weight_size + i];
      transpose(sums, p.block, spare, p.K, count, p.K);
      write(call.grad_weight, p.channel(b) * p.K, count * p.K, spare);
      return;
    }
    const i64 size = p.K * p.depth, strips = divide_up(p.group_points, N);
    const i64 b = task / strips, o = task % strips * N, some = least(N, p.group_points - o);
    const i64 count = p.block_channels(b), channel = p.channel(b) % p.group_channels;
    T* sums = spare;  // [point][kernel point][channel]
    T* more = sums + N * size;
    for (i64 copy = 0; copy < copies; copy++) {
      const T* from = grad_weights + copy * weight_size;
      T* to = copy ? more : sums;
      if constexpr (kPairs)
        each_run(p, chunks, chunk_count, b,
                 [&](i64 at, const Chunk& chunk, i64 panel, i64 column, i64 n) {
                   const i64 row = panel * 2 * p.point_words + o;
                   for (i64 i = 0; i < some; i++)
                     memcpy(to + i * size + at,
                            from + 2 * chunk.weights + (row + i) * 2 * N + column,
                            size_t(n) * sizeof(T));
                 });
      else
        transpose(from + b * size * p.group_width + o, p.group_width, to, size, some, size);
      if (copy)
        for (i64 i = 0; i < some * size; i++) sums[i] += more[i];
    }
    for (i64 i = 0; i < some; i++) {
      transpose(sums + i * size, p.depth, more, p.K, count, p.K);
      write(call.grad_weight,
            ((b / group_blocks * p.group_points + o + i) * p.group_channels + channel) * p.K,
            count * p.K, more);
    }
  }
};
