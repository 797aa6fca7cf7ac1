// Stages 1 and 2 of slim_loss: which entries of S are in a tile, and the tile's sums off S and on it. Included by
// slim_loss.cuh.
#pragma once

namespace slimkernels {
namespace cuda {
namespace {

// Returns the first entry of an id that is at least `id`, where padding is the largest id; any entry if the row's ids
// do not ascend.
template <class X, bool kStaged, int kThreads>
__device__ int32_t SlimRow<X, kStaged, kThreads>::lower_bound(uint32_t id) const {
  int32_t low = 0, high = int32_t(args.top_k);
  while (low < high) {
    const int32_t step = (high - low + 31) / 32;
    const int32_t probe = low + lane * step;
    const bool is_below = probe < high && uint32_t(ids[probe]) < id;
    const int32_t below = __popc(__ballot_sync(kAllLanes, is_below));
    if (below == 0) return low;
    const int32_t end = low + below * step;
    low = end - step + 1;
    if (end < high) high = end;
  }
  return low;
}

// Prepares the block's state, and finds the entries of S of its slice.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::start() {
#pragma unroll 1
  for (int32_t t = thread; t <= slice / kTile; t += kThreads) firsts()[t] = INT32_MAX;
  if (warp == 0) {
    state.bad = 0;
    state.label_logit = -infinity<float>();
    state.label_in_s = 0;
    state.first = begin == 0 || ids == nullptr ? 0 : lower_bound(begin);
  } else if (warp == 1) {
    state.last = rank + 1 == num_blocks || ids == nullptr ? int32_t(args.top_k) : lower_bound(begin_of(rank + 1));
  }
}

// Finds the first entry of S of every tile, and checks the ids of the slice. Every id belongs to a slice: if the row's
// ids do not ascend, some slice ends before it begins, or has an id that is not its own.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::find_entries() {
  const int32_t tiles = slice / kTile, first = state.first, last = state.last;
  const auto tile_in = [&](int32_t id) {
    const uint32_t tile = (uint32_t(id) - uint32_t(begin)) / kTile;
    return tile < uint32_t(tiles) ? int32_t(tile) : tiles;
  };
  uint32_t bad = thread == 0 && first > last;
#pragma unroll 1
  for (int32_t k = first + thread; k < last; k += kThreads) {
    const int32_t id = ids[k], before = k == 0 ? 0 : ids[k - 1];
    const bool ascends = k == 0 || (before >= 0 && id > before);
    bad += id != -1 && !(id >= 0 && id < args.vocab_size && ascends);
    const int32_t tile = tile_in(id);
#pragma unroll 1
    for (int32_t t = k == first ? 0 : tile_in(before) + 1; t <= tile; ++t) firsts()[t] = k;
  }
  if (bad > 0) atomicAdd(&state.bad, bad);
}

// Copies the logits on S of a tile to `kept`, and marks them or hides them: in the row -inf takes their place. Finds
// the levels of the sums on S.
template <class X, bool kStaged, int kThreads>
template <bool kMarks, class Teacher>
__device__ void SlimRow<X, kStaged, kThreads>::separate(int32_t start, TileSums& sums, const Teacher& teacher) {
  if (kMarks) {
    marks()[start / 32 + lane] = 0;
    __syncwarp();
  }
  float level = -infinity<float>(), teacher_level = level;
  const int32_t end = sums.first + sums.count, first = state.first;
#pragma unroll 1
  for (int32_t k = sums.first + lane; k < end; k += 32) {
    const int32_t id = ids[k], i = id - begin;
    const bool is_inside = uint32_t(i) - uint32_t(start) < kTile;  // unless the row has bad ids
    Bits bits = kMinusInfinity<X>;
    if (is_inside) bits = kStaged ? staged()[i] : row[i];
    if (kStaged) kept()[k - first] = bits;
    if (is_inside && kMarks) atomicOr(&marks()[i / 32], 1u << (i % 32));
    if (is_inside && !kMarks) staged()[i] = kMinusInfinity<X>;
    const float x = teacher(k);
    level = fmaxf(level, kMarks ? effective(X::widen(bits)) : X::widen(bits));
    teacher_level = fmaxf(teacher_level, x);
    if (id == label) {
      state.label_in_s = 1;
      state.label_logit = x;
    }
  }
  sums.on_level = max_of_warp(level);
  sums.teacher_level = max_of_warp(teacher_level);
  __syncwarp();
}

// Sums the exponentials of a tile off S, where T is 1 and z are the logits. S is marked or hidden.
template <class X, bool kStaged, int kThreads>
template <bool kMarked>
__device__ void SlimRow<X, kStaged, kThreads>::sum_off(int32_t start, TileSums& sums) const {
  // The vectors in which S is -inf.
  const auto for_each_off = [&](auto visit) {
    for_each_vector<!kMarked>(start, [&](int32_t i, const uint4& vector) {
      Bits elements[kCount];
      unpack<X>(vector, elements);
      if (kMarked) {
        const uint32_t marks = marks_from(i);
#pragma unroll
        for (int j = 0; j < kCount; ++j) elements[j] = marks >> j & 1 ? kMinusInfinity<X> : elements[j];
      }
      visit(elements);
    });
  };
  uint32_t largest = kMinusInfinity<X> * (kCount == 8 ? 0x10001u : 1u);
  for_each_off([&](const Bits(&elements)[kCount]) {
    const uint4 vector = pack<X>(elements);
    largest = X::max_word(largest, X::max_word(X::max_word(vector.x, vector.y), X::max_word(vector.z, vector.w)));
  });
  sums.off_level = max_of_warp(max_of_word<X>(largest));
  const float level = level_of(sums.off_level);
  float sum = 0;
  if (Exponent::is_exact(level)) {
    const Exponent exponent(level, options.exponent_one);
    for_each_off([&](const Bits(&elements)[kCount]) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum += exponent.uncorrected(X::widen(elements[j]));
    });
    sum *= exponent.correction;
  } else {
    for_each_off([&](const Bits(&elements)[kCount]) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum += exp2_approx((X::widen(elements[j]) - level) * options.exponent_one);
    });
  }
  sums.off_e = sums.off_one = sum_of_warp(sum);
}

// Sums all that any option needs of a tile's marked elements off S.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::sum_unmarked(int32_t start, TileSums& sums) const {
  // A softcap makes the elements past the end finite, so they are left out.
  const auto for_each_off = [&](auto visit) {
    for_each_vector<false>(start, [&](int32_t i, const uint4& vector) {
      Bits elements[kCount];
      unpack<X>(vector, elements);
      const uint32_t marks = marks_from(i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (!(marks >> j & 1) && i + j < length) visit(effective(X::widen(elements[j])));
      }
    });
  };
  float level = -infinity<float>();
  for_each_off([&](float z) { level = fmaxf(level, z); });
  sums.off_level = max_of_warp(level);
  level = level_of(sums.off_level);
  float e_sum = 0, one_sum = 0, z_sum = 0, spread = 0;
  for_each_off([&](float z) {
    const float e = exp2_approx((z - level) * options.exponent);
    const float e_one = two_temperatures() ? exp2_approx((z - level) * options.exponent_one) : e;
    e_sum += e;
    one_sum += e_one;
    z_sum += z;
    if (e_one > 0) spread += e_one * (level - z);
  });
  sums.off_e = sum_of_warp(e_sum);
  sums.off_one = sum_of_warp(one_sum);
  sums.off_z = sum_of_warp(z_sum);
  sums.off_spread = sum_of_warp(spread);
}

// Sums the student's and the teacher's logits at the tile's entries of S.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::sum_on(TileSums& sums) const {
  const float level = level_of(sums.on_level), teacher_level = level_of(sums.teacher_level);
  const int32_t end = sums.first + sums.count;
  float e_sum = 0, one_sum = 0, z_sum = 0, spread = 0, teacher_sum = 0, teacher_spread = 0;
#pragma unroll 1
  for (int32_t k = sums.first + lane; k < end; k += 32) {
    const float z = logit_on(k), x = teacher_logit(k);
    const float e = exp2_approx((z - level) * options.exponent);
    const float e_one = two_temperatures() ? exp2_approx((z - level) * options.exponent_one) : e;
    const float teacher_e = exp2_approx((x - teacher_level) * options.exponent);
    e_sum += e;
    one_sum += e_one;
    z_sum += z;
    if (e_one > 0) spread += e_one * (level - z);
    teacher_sum += teacher_e;
    if (teacher_e > 0) teacher_spread += teacher_e * (teacher_level - x) * options.inverse;
  }
  sums.on_e = sum_of_warp(e_sum);
  sums.on_one = sum_of_warp(one_sum);
  sums.on_z = sum_of_warp(z_sum);
  sums.on_spread = sum_of_warp(spread);
  sums.teacher_e = sum_of_warp(teacher_sum);
  sums.teacher_spread = sum_of_warp(teacher_spread);
}

// Sums what a plain divergence needs. Its value, the sum of q (log q - log p) or of -q log p, needs no walk after this.
template <class X, bool kStaged, int kThreads>
template <class Teacher>
__device__ void SlimRow<X, kStaged, kThreads>::sum_on_plain(TileSums& sums, const Teacher& teacher) const {
  const float level = level_of(sums.on_level), teacher_level = level_of(sums.teacher_level);
  const float factor = options.exponent_one, of_log_q = options.divergence == kSoftCe ? 0.0f : 1.0f;
  const int32_t end = sums.first + sums.count;
  float sum = 0, teacher_sum = 0, share = 0;
#pragma unroll 1
  for (int32_t k = sums.first + lane; k < end; k += 32) {
    const float z = X::widen(bits_on(k)) - level, x = teacher(k) - teacher_level;
    const float teacher_e = exp2_approx(x * factor);
    sum += exp2_approx(z * factor);
    teacher_sum += teacher_e;
    if (teacher_e > 0) share += teacher_e * (x * of_log_q - z);
  }
  sums.on_e = sums.on_one = sum_of_warp(sum);
  sums.teacher_e = sum_of_warp(teacher_sum);
  sums.share = sum_of_warp(share);
}

// Sums all tiles of the slice.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::sum_tiles() {
  // The limit holds unless the row has bad ids.
  const int32_t limit = state.first + capacity, last = state.last < limit ? state.last : limit;
#pragma unroll 1
  for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
    const int32_t start = tile * kTile;
    TileSums sums = {};
    const int32_t end = firsts()[tile + 1] < last ? firsts()[tile + 1] : last;
    sums.first = firsts()[tile] < last ? firsts()[tile] : last;
    sums.count = end - sums.first;
    if (options.plain && !options.marks) {
      with_teacher([&](const auto& teacher) {
        separate<!kStaged>(start, sums, teacher);
        sum_on_plain(sums, teacher);
      });
    } else {
      const auto teacher = [this](int32_t k) { return teacher_logit(k); };
      if (options.marks || !kStaged) {
        separate<true>(start, sums, teacher);
      } else {
        separate<false>(start, sums, teacher);
      }
      if (sums.count > 0) sum_on(sums);
      if (options.plain) sum_on_plain(sums, teacher);
    }
    if (options.marks) sum_unmarked(start, sums);
    // Statistics need what the general sums have, but the others must be the same bits as without statistics.
    if (!options.general) {
      if (kStaged && !options.marks) {
        sum_off<false>(start, sums);
      } else {
        sum_off<true>(start, sums);
      }
    }
    if (lane == 0) tiles()[tile] = sums;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
