// The copy behind channel_shuffle and concat_shuffle: `parts`, concatenated along channels, against `whole`, their shuffle.
#pragma once

#include <vector>

#include "../common.h"

namespace segfast {

struct Part {
  char* data;
  int64_t channels;
};

// A run of channels that lie in one part and in one group: element i of it is channel `first + i * groups` of the whole.
struct Segment {
  int64_t part, offset, length, first;
};

// Parts -> whole (forward) or whole -> parts (backward) of whole[n, i * groups + g] = concatenated[n, g * (C / groups) + i].
// All tensors are 4-d, of one element size, and dense in one memory format.
enum class Way { parts_to_whole, whole_to_parts };
void shuffle_copy(const std::vector<Tensor>& parts, const Tensor& whole, int64_t groups, Way way, bool channels_last);

}  // namespace segfast
