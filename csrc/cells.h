// From offsets and mask to pixel indices and corner weights.
// Included by kernel.cpp inside the namespace of one instruction set.

// Where the samples of a tile lie, for `slots` kernel points of one sample group.
template <class T, int ND>
struct Cells {
  i32* base;    // [axis][table] position without kernel point and offset
  i32* index;   // [slot][table]
  T* weight;    // [slot][table][corner] interpolation weight times mask; see Note [planar]
  T* fraction;  // [slot][axis][table], for Reverse only
  T* mask;      // [slot][table], likewise
  T* spare;     // room for [axis + 1][kPiece + lanes], or for what `loaded` is transposed from
  // Where offsets and masks lie channels last, those of a tile and sample group are transposed into
  // these: offsets [kernel point][axis][table] and masks [kernel point][table].
  Array loaded[2];
  i64 loaded_group = -1;
  // All lanes are 0, until a mask, or in Reverse a gradient, was not finite: then one is NaN.
  T taint[Plan<T, ND>::N] = {};

  Cells(Carver& carver, const Plan<T, ND>& p, i64 slots, bool reverse) {
    base = carver.take<i32>(ND * p.table);
    index = carver.take<i32>(slots * p.table);
    weight = carver.take<T>(slots * p.Q * p.table);
    fraction = carver.take<T>(reverse ? slots * ND * p.table : 0);
    mask = carver.take<T>(reverse ? slots * p.table : 0);
    i64 rows = 0;
    for (int i = 0; i < 2; i++) {
      const Array& array = i == 0 ? p.call.offset : p.call.mask;
      const i64 planes = array.data && array.last ? p.K * (i == 0 ? ND : 1) : 0;
      loaded[i] = {reinterpret_cast<char*>(carver.take<T>(planes * p.table)), DtypeOf<T>::value,
                   false};
      rows = most(rows, planes * kRows);
    }
    spare = carver.take<T>(most(rows, (ND + 1) * (kPiece + p.N)));
  }

  T tainted() const {
    T sum = 0;
    for (T lane : taint) sum += lane;
    return sum;
  }

  void place(const Plan<T, ND>& p, const Tile& tile) {
    loaded_group = -1;
    for (i64 r = 0; r < tile.rows; r++) {
      i64 rest = tile.row + r;
      for (int v = ND - 2; v >= 0; v--) {
        const i32 at = i32(rest % p.point_size[v] * p.stride[v] - p.padding[v]);
        rest /= p.point_size[v];
        for (i64 c = 0; c < tile.columns; c++) base[v * p.table + r * tile.columns + c] = at;
      }
      for (i64 c = 0; c < tile.columns; c++)
        base[(ND - 1) * p.table + r * tile.columns + c] =
            i32((tile.column + c) * p.stride[ND - 1] - p.padding[ND - 1]);
    }
    for (int v = 0; v < ND; v++)
      for (i64 m = tile.count; m < least(p.table, tile.count + p.N); m++) base[v * p.table + m] = 0;
  }

  void load(const Plan<T, ND>& p, const Tile& tile, i64 sample_group) {
    if (loaded_group == sample_group) return;
    loaded_group = sample_group;
    for (int i = 0; i < 2; i++) {
      const Array& array = i == 0 ? p.call.offset : p.call.mask;
      if (!array.data || !array.last) continue;
      const i64 planes = p.K * (i == 0 ? ND : 1);
      const Field<T> field{array, planes * (i == 0 ? p.offset_groups : p.mask_groups), p.P};
      const i64 channel =
          planes * (i == 0 ? p.offset_group(sample_group) : p.mask_group(sample_group));
      for (i64 s = 0; s < tile.segments; s++)
        for (i64 c = 0; c < tile.length; c += kRows) {
          const i64 some = least(kRows, tile.length - c), pixel = tile.first + s * tile.step + c;
          T* to = reinterpret_cast<T*>(loaded[i].data) + s * tile.length + c;
          if (array.dtype == DtypeOf<T>::value) {
            const i64 at = field.at(tile.image, channel, pixel);
            transpose(reinterpret_cast<const T*>(array.data) + at, field.channels, to, p.table,
                      planes, some);
          } else {
            field.load(tile.image, channel, planes, pixel, some, spare, planes, nullptr);
            transpose(spare, planes, to, p.table, planes, some);
          }
        }
    }
  }

  template <bool Reverse>
  void find(const Plan<T, ND>& p, const Tile& tile, i64 sample_group, i64 k, i64 slot) {
    using L = Lanes<T, Plan<T, ND>::N>;
    using V = typename L::V;
    using I = typename L::I;
    using M = typename L::M;
    constexpr int N = L::size, Q = 1 << ND;
    i32 shift[ND];
    i64 rest = k;
    for (int v = ND - 1; v >= 0; v--) {
      shift[v] = i32(rest % p.kernel[v] * p.dilation[v]);
      rest /= p.kernel[v];
    }
    load(p, tile, sample_group);
    const i64 point = p.given_point(k);
    // For the planes of each axis of the offsets, and of the mask: the array, the place in it, and
    // the size of a plane.
    const Array* arrays[ND + 1];
    i64 begin[ND + 1], step[ND + 1], size[ND + 1];
    for (int v = 0; v <= ND; v++) {
      const bool masks = v == ND;
      const Array& given = masks ? p.call.mask : p.call.offset;
      const i64 group = masks ? tile.image * p.mask_groups + p.mask_group(sample_group)
                              : tile.image * p.offset_groups + p.offset_group(sample_group);
      const i64 plane = masks ? point : point * ND + p.given_axis(v);
      if (given.last) {
        arrays[v] = &loaded[masks], size[v] = p.table, step[v] = tile.length;
        begin[v] = plane * p.table;
      } else {
        arrays[v] = &given, size[v] = p.P, step[v] = tile.step;
        begin[v] = (group * p.K * (masks ? 1 : ND) + plane) * p.P + tile.first;
      }
    }
    V tainted = L::zero();
    for (i64 s = 0; s < tile.segments; s++) {
      const T* given[ND + 1];  // offsets and mask
      for (int v = 0; v <= ND; v++) {
        const Array& array = *arrays[v];
        T* scratch = spare + v * (kPiece + N);
        given[v] = nullptr;
        if (!array.data) continue;
        const i64 at = begin[v] + s * step[v];
        // A tile takes a run of each plane that is too short for the processor to foresee the next
        // one. That is the same run of the next kernel point, or of the next group's first.
        prefetch(array, at + (v < ND ? ND : 1) * size[v], tile.length);
        if (tile.length >= N) {
          given[v] = view(array, at, tile.length, scratch);
        } else {
          read(array, at, tile.length, scratch);
          for (i64 i = tile.length; i < N; i++) scratch[i] = 0;
          given[v] = scratch;
        }
      }
      // The last vector overlaps the one before. If a whole segment is shorter than a vector, what
      // is too much is overwritten by the next segment.
      for (i64 c0 = 0; c0 < tile.length; c0 += N) {
        const i64 c = tile.length >= N ? least(c0, tile.length - N) : 0;
        const i64 m = s * tile.length + c;
        // The offset is split into integer and fraction, and not the position: in a large image a
        // position has few bits left for its fraction.
        I cell[ND];
        V part[ND];
        M near = L::splat(0) < L::splat(1);
        UNROLL
        for (int v = 0; v < ND; v++) {
          cell[v] = L::load_index(base + v * p.table + m) + L::splat_index(shift[v]);
          part[v] = L::zero();
          if (!given[v]) continue;
          const V offset = L::load(given[v] + c);
          const M fits = (offset >= L::splat(-kFar)) & (offset < L::splat(kFar));
          // What does not fit becomes 0, since its conversion to an integer would be undefined.
          const V safe = L::select(fits, offset, L::zero()), floor = L::floor(safe);
          near = near & fits;
          cell[v] = cell[v] + L::to_index(floor);
          part[v] = safe - floor;
        }
        I within =
            (cell[0] >= L::splat_index(-1)) & (cell[0] < L::splat_index(i32(p.image_size[0])));
        UNROLL
        for (int v = 1; v < ND; v++)
          within = within & (cell[v] >= L::splat_index(-1)) &
                   (cell[v] < L::splat_index(i32(p.image_size[v])));
        const M inside = near & L::mask(within);
        const V mask_value = given[ND] ? L::load(given[ND] + c) : L::splat(1);
        // A mask multiplies its sample even where that is 0, as a sample outside is: the product is
        // 0, or NaN if the mask is not finite.
        const V outside = mask_value * L::zero();
        tainted = tainted + outside;
        // A position outside gets its cell before an index is computed, since the index of one far
        // outside would overflow.
        I index_value = L::splat_index(0);
        V corner[Q];
        corner[0] = L::select(inside, mask_value, outside);
        UNROLL
        for (int v = 0; v < ND; v++) {
          // Indices count from the border's first pixel. Positions outside get the cell after the
          // end of the slowest axis, Plan::outside.
          const I border = L::splat_index(v == 0 ? i32(p.image_size[0]) + 1 : 0);
          const I safe = L::select_index(inside, cell[v] + L::splat_index(1), border);
          index_value = index_value * L::splat_index(i32(p.padded[v])) + safe;
          if (Reverse) L::store(fraction + (slot * ND + v) * p.table + m, part[v]);
          UNROLL
          for (int q = (1 << v) - 1; q >= 0; q--) {
            const V high = corner[q] * part[v];
            corner[2 * q + 1] = high;
            corner[2 * q] = corner[q] - high;
          }
        }
        L::store_index(index + slot * p.table + m, index_value);
        if (!p.planar) L::template transpose<Q>(corner);
        T* to = weight + slot * p.table * Q + m * (p.planar ? 1 : Q);
        UNROLL
        for (int q = 0; q < Q; q++) L::store(to + q * (p.planar ? p.table : N), corner[q]);
        if (Reverse) L::store(mask + slot * p.table + m, mask_value);
      }
    }
    L::store(taint, L::load(taint) + tainted);
    if (!p.planar) return;
    // Samples that only fill up the last vector get no weight.
    const i64 end = slot * p.table + tile.count;
    L::store_index(index + end, L::splat_index(i32(p.outside())));
    for (int q = 0; q < Q; q++)
      L::store(weight + slot * p.table * Q + q * p.table + tile.count, L::zero());
  }
};
