// The statistics of a row of slim_loss that take walks of their own: the student's first choice, and how many of the
// entries of S are among its K largest logits, which takes a selection. Included by slim_loss.cuh.
#pragma once

namespace slimkernels {
namespace cuda {
namespace {

// Finds the first index of the largest key of all lanes.
__device__ inline void largest_of_warp(uint32_t& key, uint32_t& index) {
  const uint32_t best = __reduce_max_sync(kAllLanes, key);
  index = ~__reduce_max_sync(kAllLanes, key == best ? ~index : 0u);
  key = best;
}

// Sets state.argmax to the first index of the row's largest logit.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::find_argmax() {
  uint32_t key = 0, index = ~0u;
  for (int32_t i = thread; i < length; i += kThreads) {
    const uint32_t other = order_key<X>(element(i));
    if (other > key) {
      key = other;
      index = begin + i;
    }
  }
  largest_of_warp(key, index);
  if (lane == 0) {
    state.best_key[warp] = key;
    state.best_index[warp] = index;
  }
  sync_cluster();
  if (warp != 0) return;
  key = 0;
  index = ~0u;
  for (uint32_t i = lane; i < num_blocks * kWarps; i += 32) {
    const uint32_t other = state_of(i / kWarps).best_key[i % kWarps];
    if (other > key) {
      key = other;
      index = state_of(i / kWarps).best_index[i % kWarps];
    }
  }
  largest_of_warp(key, index);
  state.argmax = index;
}

// Adds the block's number of entries of S that are among the row's K largest logits to state.shared. Equal logits count
// in the order of their indices.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::count_shared() {
  constexpr int kRounds = sizeof(Bits);  // of a radix selection, each of a digit of 8 bits
  for (int i = thread; i < kRounds * kDigits; i += kThreads) histogram()[i] = 0;
  if (thread == 0) state.shared = 0;
  __syncthreads();
  uint32_t kth = 0, wanted = uint32_t(state.numbers.num_kept);
  if (wanted == 0) return;
  for (int round = 0; round < kRounds; ++round) {
    const int shift = 8 * (kRounds - 1 - round);
    uint32_t* const digits = histogram() + round * kDigits;
    for (int32_t base = warp * 32; base < length; base += kThreads) {
      uint32_t digit = kDigits;
      if (base + lane < length) {
        const uint32_t key = order_key<X>(element(base + lane));
        if (round == 0 || key >> (shift + 8) == kth) digit = key >> shift & (kDigits - 1);
      }
      const uint32_t peers = __match_any_sync(kAllLanes, digit);
      if (digit < kDigits && lane == __ffs(peers) - 1) atomicAdd(&digits[digit], uint32_t(__popc(peers)));
    }
    sync_cluster();
    if (warp == 0) {
      constexpr int kPerLane = kDigits / 32;  // lane 0 has the highest digits
      uint32_t counts[kPerLane] = {}, own = 0;
      for (uint32_t block = 0; block < num_blocks; ++block) {
        const uint32_t* const from = in_block(digits, block);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) counts[j] += from[kDigits - 1 - (lane * kPerLane + j)];
      }
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) own += counts[j];
      uint32_t higher = inclusive_sum_of_warp(own, lane) - own;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (higher < wanted && wanted <= higher + counts[j]) {
          state.kth = kth << 8 | uint32_t(kDigits - 1 - (lane * kPerLane + j));
          state.ties_kept = wanted - higher;
        }
        higher += counts[j];
      }
    }
    __syncthreads();
    kth = state.kth;
    wanted = state.ties_kept;
  }

  for (int32_t t = warp; t * kTile < length; t += kWarps) {
    uint32_t tied = 0;
    for (int32_t i = t * kTile + lane; i < (t + 1) * kTile && i < length; i += 32) {
      tied += order_key<X>(element(i)) == kth;
    }
    tied = __reduce_add_sync(kAllLanes, tied);
    if (lane == 0) tiles()[t].tied = int32_t(tied);
  }
  sync_cluster();
  if (warp == 0) {
    // The tile of the last tie that is kept, and its rank in there.
    int32_t tile = 0;
    for (int32_t base = 0; base < num_tiles(); base += 32) {
      const int32_t t = base + lane;
      const uint32_t own = t < num_tiles() ? uint32_t(tile_of(t).tied) : 0u;
      const uint32_t up_to = inclusive_sum_of_warp(own, lane);
      const uint32_t hit = __ballot_sync(kAllLanes, wanted <= up_to);
      if (hit != 0) {
        const int found = __ffs(hit) - 1;
        tile = base + found;
        wanted -= __reduce_add_sync(kAllLanes, lane < found ? own : 0u);
        break;
      }
      wanted -= __reduce_add_sync(kAllLanes, own);
    }
    const Bits* const whole = row - begin;
    for (int32_t start = tile * kTile; start < args.vocab_size; start += 32) {
      const int32_t i = start + lane;
      uint32_t ties = __ballot_sync(kAllLanes, i < args.vocab_size && order_key<X>(whole[i]) == kth);
      if (uint32_t(__popc(ties)) < wanted) {
        wanted -= __popc(ties);
        continue;
      }
      for (; wanted > 1; --wanted) ties &= ties - 1;
      state.last_tie = start + __ffs(ties) - 1;
      break;
    }
  }
  __syncthreads();
  const int32_t last = state.last_tie;
  uint32_t shared = 0;
  for (int32_t t = warp; t * kTile < length; t += kWarps) {
    const TileSums& tile = tiles()[t];
    for (int32_t k = tile.first + lane; k < tile.first + tile.count; k += 32) {
      const uint32_t key = order_key<X>(element(ids[k] - begin));
      shared += key > kth || (key == kth && ids[k] <= last);
    }
  }
  shared = __reduce_add_sync(kAllLanes, shared);
  // The first warps add up the blocks after the barrier that follows the divergence.
  if (lane == 0) atomicAdd(&state.shared, shared);
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
