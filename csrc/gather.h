// Points from the image: the forward of deform_conv, but for depthwise ones.
// Included by kernel.cpp inside the namespace of one instruction set.

// Like Field::store, but of from[c * step + p], with a channel's pixels side by side.
template <class T>
void store_planes(const Field<T>& field, i64 image, i64 channel, i64 count, i64 pixel, i64 n,
                  const T* from, i64 step, T* scratch) {
  if (!field.array.last) {
    for (i64 c = 0; c < count; c++)
      write(field.array, field.at(image, channel + c, pixel), n, from + c * step);
    return;
  }
  for (i64 c = 0; c < count; c += 64) {
    const i64 some = least(64, count - c);
    transpose(from + c * step, step, scratch, some, n, some);
    field.store(image, channel + c, some, pixel, n, scratch, some, nullptr);
  }
}

// In general a thread takes one tile through all columns. A tile touches some fifteen rows of each
// group's image, and the tile below it touches almost the same ones. Where many groups have few
// channels each, the rows of all groups do not stay in the cache until the tile below comes. There
// a thread takes a stack of tiles through the columns of a few groups before it goes on to others.
template <class T, int ND>
Status gather(const Call& call) {
  using P = Plan<T, ND>;
  P p(call, kPairs ? 4 : 2, 1);
  const Sampler<T> sampler = sampler_of<T, ND, kColumnsWork, false>(p.lanes, p.vectors, p.planar);
  const i64 group_units = p.units() / p.groups, group_words = p.column_words(group_units);
  const i64 chunk_units = p.units_per_chunk(group_units, kPairs ? kTileNumbers : 1,
                                            p.stacks() ? kTerms * kPerWord : kColumns / kPerWord);
  const i64 slots = p.blocks_per_sample_group() == 1 ? 1 : p.K;
  const i64 all_panels = p.groups * p.panels;

  // How many images are packed at a time, and, where tiles are too few for the threads, into how
  // many parts the points are split.
  const i64 flight =
      least(p.batch, most(kFlightBytes / p.image_bytes(), divide_up(p.threads, p.tiles)));
  const i64 splits = p.share_tiles(flight, p.threads, all_panels);
  const i64 stack = chunk_units < p.units() ? p.stack_tiles(flight * splits, p.threads) : 1;
  const i64 tasks = divide_up(p.row_tiles, stack) * p.column_tiles;
  const i64 points_size = p.tile_room * p.group_width;  // of a tile

  struct Scratch {
    Cells<T, ND> cells;
    T *columns, *points;
    Scratch(Carver& c, const P& p, i64 slots, i64 chunk_units, i64 points_size)
        : cells(c, p, slots, false),
          columns(c.take<T>(p.tile_room * p.column_words(chunk_units))),
          points(c.take<T>(points_size)) {}
  };
  Carver measure{nullptr};
  Scratch(measure, p, slots, chunk_units, stack * points_size);
  const i64 scratch_bytes = i64(measure.used);
  const i64 edge_size = most(Field<T>::scratch_size, (p.N + 1) * p.K * p.block);

  T *packed, *weights, *edge;
  T* taints;  // one for each thread, see Cells
  char* scratch;
  const auto layout = [&](Carver c) {
    packed = c.take<T>(flight * p.blocks * p.plane * p.words);
    weights = c.take<T>(all_panels * group_words * p.panel);
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
  const i64 weight_tasks =
      p.planar ? p.blocks * p.group_points : all_panels * p.panel_vectors * (p.blocks / p.groups);
  const i64 pages = touch_tasks(call.points, p.batch * p.point_channels * p.P, p.team);
  together(p.team, [&](const Worker& worker) {
    T* spare = edge + worker.thread * edge_size;
    for (i64 first = 0; first < p.batch; first += flight) {
      const i64 images = least(flight, p.batch - first);
      const i64 once = first == 0 ? pages + weight_tasks : 0;
      worker.share(once + pack_image_tasks(p, images), [&](i64 task) {
        if (task >= once) return pack_image(p, first, task - once, packed, spare);
        if (task < pages) return touch(call.points, task);
        if (p.planar)
          pack_weight_by_plane(p, task - pages, weights, spare);
        else
          pack_weight_by_point(p, task - pages, weights, spare);
      });
      worker.share(images * tasks * splits, [&](i64 task) {
        Carver carver{scratch + worker.thread * scratch_bytes};
        Scratch s(carver, p, slots, chunk_units, stack * points_size);
        const i64 split = task % splits, image = task / splits / tasks;
        const i64 column = task / splits % tasks % p.column_tiles;
        const i64 row = task / splits % tasks / p.column_tiles * stack;
        const i64 tiles = least(stack, p.row_tiles - row);
        const auto each_tile = [&](const auto& body) {
          for (i64 t = 0; t < tiles; t++)
            body(p.tile(first + image, (row + t) * p.column_tiles + column),
                 s.points + t * points_size);
        };
        // The tile that has been placed, and the sample group whose cells have been found, if any.
        i64 placed = -1, current = -1;
        const i64 panel_end = all_panels * (split + 1) / splits;
        for (i64 j = all_panels * split / splits; j < panel_end;) {
          const i64 group = j / p.panels, some = least(panel_end, (group + 1) * p.panels) - j;
          const i64 skipped = j % p.panels * p.panel, point = p.group_point(group) + skipped;
          const i64 count = least(some * p.panel, p.points_in(group) - skipped);
          const i64 width = some * p.panel;
          if (call.bias.data) {
            each_tile([&](const Tile& tile, T* sums) {
              if (p.planar) {
                for (i64 i = 0; i < count; i++) {
                  T bias;
                  read(call.bias, point + i, 1, &bias);
                  for (i64 m = 0; m < p.tile_room; m++) sums[i * p.tile_room + m] = bias;
                }
                return;
              }
              for (i64 m = 0; m < tile.count; m++) {
                if (m == 0)
                  read(call.bias, point, count, sums);
                else
                  memcpy(sums + m * width, sums, size_t(count) * sizeof(T));
                for (i64 i = count; i < width; i++) sums[m * width + i] = 0;
              }
            });
          }
          for (i64 u0 = 0; u0 < group_units; u0 += chunk_units) {
            const i64 units = least(chunk_units, group_units - u0);
            const i64 step = p.planar ? p.tile_room : p.column_words(chunk_units);
            const i64 inner = p.column_words(units);
            T* panel = weights + (j * group_words + u0 * p.words) * p.panel;
            each_tile([&](const Tile& tile, T* sums) {
              if (tile.first != placed) {
                placed = tile.first, current = -1;
                s.cells.place(p, tile);
              }
              for (i64 u = u0; u < u0 + units; u++) {
                const i64 b = (group * group_units + u) / p.K, k = u % p.K;
                const i64 sample_group = p.sample_group(b), slot = slots == 1 ? 0 : k;
                if (slots == 1) {
                  s.cells.template find<false>(p, tile, sample_group, k, 0);
                } else if (sample_group != current) {
                  current = sample_group;
                  for (i64 q = 0; q < p.K; q++)
                    s.cells.template find<false>(p, tile, sample_group, q, q);
                }
                const i64 column = (u - u0) * (p.planar ? p.run * step : p.words);
                sampler({tile.count, packed + (image * p.blocks + b) * p.plane * p.words, nullptr,
                         p.steps, s.cells.index + slot * p.table,
                         s.cells.weight + slot * p.Q * p.table, nullptr, s.columns + column, step,
                         nullptr, p.run, p.table, false});
              }
              const bool accumulate = call.bias.data || u0 > 0;
              if constexpr (kPairs) {
                // Results go to short runs that are far apart. Prefetched now, they are in the
                // cache when the store comes.
                if (u0 + units == group_units && !call.points.last)
                  for (i64 c = 0; c < count; c++)
                    for (i64 i = 0; i < tile.segments; i++)
                      prefetch(call.points,
                               points.at(tile.image, point + c, tile.first + i * tile.step),
                               tile.length);
                const i64 words = units * p.words;
                for (i64 m = 0; m < tile.count && words < inner; m++)
                  memset(s.columns + m * step + words, 0, size_t(inner - words) * sizeof(T));
                multiply_pairs(call.tiles, p.panel_vectors, tile.count, some, inner, s.columns,
                               step, {panel, p.panel, group_words * p.panel},
                               {sums, width, p.panel}, accumulate);
              } else if (p.planar) {
                multiply<T, false, false>(2, count, divide_up(tile.count, 2 * p.N), inner,
                                          weights + point * group_words + u0 * p.run, group_words,
                                          s.columns, step, 2 * p.N, sums, step, accumulate);
              } else {
                multiply<T, false, false>(p.panel_vectors, tile.count, some, inner, s.columns, step,
                                          panel, p.panel, group_words * p.panel, sums, width,
                                          accumulate);
              }
            });
          }
          each_tile([&](const Tile& tile, const T* sums) {
            for (i64 i = 0; i < tile.segments; i++) {
              const i64 pixel = tile.first + i * tile.step, m = i * tile.length;
              if constexpr (kPairs)
                store_pairs(points, tile.image, point, count, pixel, tile.length, sums + m * width,
                            width, spare);
              else if (p.planar)
                store_planes(points, tile.image, point, count, pixel, tile.length, sums + m,
                             p.tile_room, spare);
              else
                points.store(tile.image, point, count, pixel, tile.length, sums + m * width, width,
                             spare);
            }
          });
          j += some;
        }
        taints[worker.thread] += s.cells.tainted();
      });
    }
  });
  const Status status = status_of(taints, p.team);
  workspace_give(p.team);
  return status;
}
