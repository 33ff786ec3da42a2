// Kernels for the steps that are bound by memory, in plain C++ for any machine.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine/kernels/activation.h"
#include "engine/kernels/kernels.h"
#include "engine/kernels/level.h"

namespace rbln_vae {
namespace {

template <class T>
T* at(const Context& context, Index offset) {
  return reinterpret_cast<T*>(context.at(offset));
}

// Calls a function with a value of the type.
template <class F>
void with_type(DType dtype, F&& use) {
  switch (dtype) {
    case DType::kFloat32: return use(float{});
    case DType::kBFloat16: return use(BFloat16{});
    case DType::kFloat16: return use(Float16{});
  }
}

template <class T>
void statistics_of(const StatisticsStep& s, const Context& context, Index item) {
  const Index cell = item;
  const Index x = item % s.cells_across() * s.cell_width;
  const Index y = item / s.cells_across() % s.cells_down() * s.cell_height;
  const Index n = item / s.cells_across() / s.cells_down();
  const Index height = smaller(s.cell_height, s.input.height - y);
  const Index width = smaller(s.cell_width, s.input.width - x);
  const Index blocks = s.input.blocks();
  float* partials = at<float>(context, s.partials) + cell * 2 * blocks * kBlock;
  for (Index block = 0; block < blocks; ++block) {
    const T* from =
        at<const T>(context, s.input.offset) + s.input.at(n, block, y) + x * kBlock;
    double sum[kBlock] = {}, square[kBlock] = {};
    float shift[kBlock];
    for (Index c = 0; c < kBlock; ++c) shift[c] = to_float(from[c]);
    for (Index row = 0; row < height; ++row) {
      float row_sum[kBlock] = {}, row_square[kBlock] = {};
      for (Index column = 0; column < width; ++column) {
        const T* pixel = from + (row * s.input.row + column) * kBlock;
        for (Index c = 0; c < kBlock; ++c) {
          const float d = to_float(pixel[c]) - shift[c];
          row_sum[c] += d;
          row_square[c] += d * d;
        }
      }
      for (Index c = 0; c < kBlock; ++c) {
        sum[c] += row_sum[c];
        square[c] += row_square[c];
      }
    }
    for (Index c = 0; c < kBlock; ++c) {
      const double mean = sum[c] / static_cast<double>(height * width);
      const double rest = square[c] - sum[c] * mean;
      partials[block * kBlock + c] = static_cast<float>(shift[c] + mean);
      partials[(blocks + block) * kBlock + c] = static_cast<float>(rest < 0 ? 0 : rest);
    }
  }
}

// Tells the run if a stored line of an image holds an infinity.
template <class T>
void check_range(const T* line, Index width, const Context& context, Index n) {
  bool any = false;
  for (Index i = 0; i < width * kBlock; ++i) any |= overflowed(line[i]);
  if (any) context.overflow(n);
}

template <class T>
void modulate_of(const ModulateStep& s, const Context& context, Index item) {
  const Index y = item % s.output.height;
  const Index block = item / s.output.height % s.output.blocks();
  const Index n = item / s.output.height / s.output.blocks();
  const Index blocks = s.output.blocks();
  const T* from = at<const T>(context, s.input.offset) + s.input.at(n, block, y);
  T* to = at<T>(context, s.output.offset) + s.output.at(n, block, y);
  const T* scales = at<const T>(context, s.scale.offset) + s.scale.at(n, block, y / s.factor);
  const T* shifts =
      s.shift.channels == 0
          ? nullptr
          : at<const T>(context, s.shift.offset) + s.shift.at(n, block, y / s.factor);
  float norm_scale[kBlock], norm_shift[kBlock];
  for (Index c = 0; c < kBlock; ++c) {
    norm_scale[c] = 1.0f;
    norm_shift[c] = 0.0f;
  }
  if (s.coefficients != kNone) {
    const float* given = at<const float>(context, s.coefficients);
    for (Index c = 0; c < kBlock; ++c) {
      norm_scale[c] = given[(2 * n * blocks + block) * kBlock + c];
      norm_shift[c] = given[((2 * n + 1) * blocks + block) * kBlock + c];
    }
  }
  for (Index column = 0; column < s.scale.width; ++column) {
    float scale[kBlock], shift[kBlock];
    for (Index c = 0; c < kBlock; ++c) {
      scale[c] = to_float(scales[column * kBlock + c]);
      shift[c] = shifts == nullptr ? 0.0f : to_float(shifts[column * kBlock + c]);
    }
    for (Index x = column * s.factor; x < (column + 1) * s.factor; ++x) {
      // In a copy: the output may be the input.
      float values[kBlock];
      for (Index c = 0; c < kBlock; ++c) values[c] = to_float(from[x * kBlock + c]);
      for (Index c = 0; c < kBlock; ++c) {
        values[c] = (values[c] * norm_scale[c] + norm_shift[c]) * scale[c] + shift[c];
      }
      for (Index c = 0; c < kBlock; ++c) from_float(values[c], to[x * kBlock + c]);
    }
  }
  check_range(to, s.output.width, context, n);
}

template <class T>
void pointwise_of(const PointwiseStep& s, const Context& context, Index item) {
  const Index y = item % s.output.height;
  const Index block = item / s.output.height % s.output.blocks();
  const Index n = item / s.output.height / s.output.blocks();
  const Index blocks = s.output.blocks();
  T* to = at<T>(context, s.output.offset) + s.output.at(n, block, y);
  if (s.copies()) {
    const T* from = at<const T>(context, s.input.offset) + s.input.at(n, block, y);
    std::memmove(static_cast<void*>(to), from,
                 static_cast<std::size_t>(s.output.width * kBlock) * sizeof(T));
    return;
  }
  const T* residual =
      s.residual.channels == 0
          ? nullptr
          : at<const T>(context, s.residual.offset) + s.residual.at(n, block, y);
  float scale[kBlock], shift[kBlock];
  for (Index c = 0; c < kBlock; ++c) {
    // Padding channels of the last block stay zero.
    scale[c] = block * kBlock + c < s.output.channels ? 1.0f : 0.0f;
    shift[c] = 0.0f;
  }
  if (s.reading.coefficients != kNone) {
    const float* given = at<const float>(context, s.reading.coefficients);
    for (Index c = 0; c < kBlock; ++c) {
      scale[c] = given[(2 * n * blocks + block) * kBlock + c];
      shift[c] = given[((2 * n + 1) * blocks + block) * kBlock + c];
    }
  }
  const Index height = s.upsample ? 2 * s.input.height : s.input.height;
  const Index width = s.upsample ? 2 * s.input.width : s.input.width;
  const Index down = y - s.above;
  const float factor = static_cast<float>(s.factor);
  float offset[kBlock];
  for (Index c = 0; c < kBlock; ++c) {
    offset[c] = block * kBlock + c < s.output.channels ? static_cast<float>(s.offset) : 0.0f;
  }
  for (Index x = 0; x < s.output.width; ++x) {
    const Index right = x - s.left;
    const bool inside = down >= 0 && down < height && right >= 0 && right < width;
    float values[kBlock] = {};
    if (inside) {
      const Index row = s.upsample ? down / 2 : down;
      const Index column = s.upsample ? right / 2 : right;
      const T* from =
          at<const T>(context, s.input.offset) + s.input.at(n, block, row) + column * kBlock;
      for (Index c = 0; c < kBlock; ++c) {
        values[c] = to_float(from[c]) * scale[c] + shift[c];
      }
      if (s.reading.activation != Activation::kNone) {
        for (float& value : values) value = activate(s.reading.activation, value);
      }
      for (Index c = 0; c < kBlock; ++c) values[c] = values[c] * factor + offset[c];
    }
    for (Index c = 0; c < kBlock; ++c) {
      const float add = residual == nullptr ? 0.0f : to_float(residual[x * kBlock + c]);
      from_float(values[c] + add, to[x * kBlock + c]);
    }
  }
  check_range(to, s.output.width, context, n);
}

// Consecutive channels that come from consecutive channels of the same pixels move together.
struct Run {
  Index channel;  // of the output's block
  Index count;
  Index from;     // of a block of the input
  Index right;    // the column in a cell of the input
};

template <class T>
void shuffle_of(const ShuffleStep& s, const Context& context, Index item) {
  const Index y = item % s.output.height;
  const Index block = item / s.output.height % s.output.blocks();
  const Index n = item / s.output.height / s.output.blocks();
  const Index up = s.up(), down = s.down();
  const Index channels = smaller(kBlock, s.output.channels - block * kBlock);
  T* to = at<T>(context, s.output.offset) + s.output.at(n, block, y);
  const T* input = at<const T>(context, s.input.offset);
  if (channels < kBlock) {
    std::memset(static_cast<void*>(to), 0,
                static_cast<std::size_t>(s.output.width * kBlock) * sizeof(T));
  }
  for (Index column = 0; column < up; ++column) {
    Run runs[kBlock];
    const T* rows[kBlock];
    Index count = 0;
    for (Index c = 0; c < channels; ++c) {
      const Index element = ((block * kBlock + c) * up + y % up) * up + column;
      const Index source = s.order[element];
      const Index cell = source % (down * down);
      const Index channel = source / (down * down);
      const T* row = input + s.input.at(n, channel / kBlock, y / up * down + cell / down);
      const Run next{c, 1, channel % kBlock, cell % down};
      if (count > 0) {
        Run& last = runs[count - 1];
        if (rows[count - 1] == row && last.right == next.right &&
            last.from + last.count == next.from) {
          ++last.count;
          continue;
        }
      }
      rows[count] = row;
      runs[count++] = next;
    }
    for (Index x = column; x < s.output.width; x += up) {
      for (Index i = 0; i < count; ++i) {
        const Run& run = runs[i];
        const T* from = rows[i] + (x / up * down + run.right) * kBlock + run.from;
        std::memcpy(to + x * kBlock + run.channel, from,
                    static_cast<std::size_t>(run.count) * sizeof(T));
      }
    }
  }
}

template <class T, class Outside>
void import_line(const ImportStep& s, const Context& context, Index n, Index block, Index y) {
  const Tensor& tensor = context.inputs[s.tensor];
  const Index width = s.image.width;
  T* to = at<T>(context, s.image.offset) + s.image.at(n, block, y);
  const Index channels = smaller(kBlock, s.image.channels - block * kBlock);
  for (Index x = 0; x < width; ++x) {
    for (Index c = channels; c < kBlock; ++c) from_float(0.0f, to[x * kBlock + c]);
  }
  for (Index c = 0; c < channels; ++c) {
    const Outside* from = static_cast<const Outside*>(tensor.data) + n * tensor.strides[0] +
                          (block * kBlock + c) * tensor.strides[1] +
                          (s.first_row + y) * tensor.strides[2];
    for (Index x = 0; x < width; ++x) {
      from_float(to_float(from[x * tensor.strides[3]]), to[x * kBlock + c]);
    }
  }
  check_range(to, width, context, n);
}

template <class T, class Outside>
void export_line(const ExportStep& s, const Context& context, Index n, Index block, Index y) {
  const Tensor& tensor = context.outputs[s.tensor];
  const Index width = s.image.width;
  const T* from = at<const T>(context, s.image.offset) + s.image.at(n, block, y);
  const Index channels = smaller(kBlock, s.image.channels - block * kBlock);
  for (Index c = 0; c < channels; ++c) {
    Outside* to = static_cast<Outside*>(tensor.data) + n * tensor.strides[0] +
                  (block * kBlock + c) * tensor.strides[1] +
                  (s.first_row + y) * tensor.strides[2];
    for (Index x = 0; x < width; ++x) {
      from_float(to_float(from[x * kBlock + c]), to[x * tensor.strides[3]]);
    }
    if constexpr (requires { typename Outside::Shown; }) {
      if (tensor.finite == nullptr) continue;
      bool finite = true;
      for (Index x = 0; x < width; ++x) {
        typename Outside::Shown shown;
        from_float(to_float(from[x * kBlock + c]), shown);
        finite &= std::abs(to_float(shown)) <= std::numeric_limits<float>::max();
      }
      // Several threads may do so for one image.
      if (!finite) std::atomic_ref(tensor.finite[n]).store(false, std::memory_order_relaxed);
    }
  }
}

// Calls a function with an element of the type that a caller's tensor has.
template <class Run>
void with_element(const Tensor& tensor, const Run& run) {
  const auto shown = [&]<class Shown>(Shown element) {
    if (tensor.levels) {
      run(Level<Shown>{});
    } else {
      run(element);
    }
  };
  with_type(tensor.dtype, shown);
}

}  // namespace

void statistics(DType dtype, const StatisticsStep& s, const Context& context, Index item) {
  with_type(dtype, [&]<class T>(T) { statistics_of<T>(s, context, item); });
}

// Means of cells are weighted by their pixels and summed in the order of the cells, so the result
// does not depend on the number of threads.
void norm(const NormStep& s, const Context& context, Index item) {
  const Index n = item / s.parts() * s.together();
  const Index part = item % s.parts();
  const Index size = s.channels / s.groups;
  const Index begin = s.groups * part / s.parts();
  const Index end = s.groups * (part + 1) / s.parts();
  const Index width = ceil_div(s.channels, kBlock) * kBlock;
  const Index down = s.cells_down();
  const Index across = s.cells_across();
  const float* partials =
      at<const float>(context, s.partials) + n * down * across * 2 * s.partial_channels;
  float* scale = at<float>(context, s.coefficients) + n * 2 * width;
  float* shift = scale + width;

  // One group at a time, so that the lines that are read of all cells stay in the cache.
  for (Index group = begin; group < end; ++group) {
    const Index first = group * size;
    const auto each_cell = [&](auto&& use) {
      for (Index cell = 0; cell < s.together() * down * across; ++cell) {
        const Index height = smaller(
            s.cell_height, s.grid_height - cell / across % down * s.cell_height);
        const Index columns =
            smaller(s.cell_width, s.grid_width - cell % across * s.cell_width);
        use(partials + cell * 2 * s.partial_channels + first,
            static_cast<double>(height * columns * s.points));
      }
    };
    double total = 0;
    each_cell([&](const float* means, double count) {
      double sum = 0;
      for (Index c = 0; c < size; ++c) sum += means[c];
      total += count * sum;
    });
    const double count =
        static_cast<double>(s.together() * s.grid_height * s.grid_width * s.points) *
        static_cast<double>(size);
    const double mean = total / count;
    double squares = 0;
    each_cell([&](const float* means, double weight) {
      const float* within = means + s.partial_channels;
      double inner = 0, outer = 0;
      for (Index c = 0; c < size; ++c) {
        const double distance = means[c] - mean;
        inner += within[c];
        outer += distance * distance;
      }
      squares += inner + weight * outer;
    });
    const double eps = static_cast<double>(static_cast<float>(s.eps));
    const double deviation = std::sqrt(squares / count + eps);
    for (Index c = first; c < first + size; ++c) {
      const double factor = static_cast<double>(s.weight[c]) / deviation;
      scale[c] = static_cast<float>(factor);
      shift[c] = static_cast<float>(static_cast<double>(s.bias[c]) - mean * factor);
    }
    // The other images of a clip have the same.
    for (Index other = 1; other < s.together(); ++other) {
      std::copy_n(scale + first, size, scale + other * 2 * width + first);
      std::copy_n(shift + first, size, shift + other * 2 * width + first);
    }
  }
  if (part == 0) {
    for (Index other = 0; other < s.together(); ++other) {
      std::fill(scale + other * 2 * width + s.channels, scale + (other * 2 + 1) * width, 0.0f);
      std::fill(shift + other * 2 * width + s.channels, shift + (other * 2 + 1) * width, 0.0f);
    }
  }
}

void modulate(DType dtype, const ModulateStep& s, const Context& context, Index item) {
  with_type(dtype, [&]<class T>(T) { modulate_of<T>(s, context, item); });
}

void pointwise(DType dtype, const PointwiseStep& s, const Context& context, Index item) {
  with_type(dtype, [&]<class T>(T) { pointwise_of<T>(s, context, item); });
}

void shuffle(DType dtype, const ShuffleStep& s, const Context& context, Index item) {
  with_type(dtype, [&]<class T>(T) { shuffle_of<T>(s, context, item); });
}

void move_rows(DType dtype, const MoveRowsStep& s, const Context& context, Index item) {
  const Index size = bytes(dtype);
  const Index row = s.image.row * kBlock * size;
  std::byte* to = context.at(s.image.offset) +
                  s.image.at(item / s.image.blocks(), item % s.image.blocks(), 0) * size;
  // From the top: no row is overwritten before it is moved.
  for (Index y = 0; y < s.rows; ++y, to += row) {
    std::memmove(to, to + s.from_row * row,
                 static_cast<std::size_t>(s.image.width * kBlock * size));
  }
}

void import_image(DType dtype, const ImportStep& s, const Context& context, Index item) {
  const Index y = item % s.image.height;
  const Index block = item / s.image.height % s.image.blocks();
  const Index n = item / s.image.height / s.image.blocks();
  with_type(dtype, [&]<class T>(T) {
    with_element(context.inputs[s.tensor], [&]<class Outside>(Outside) {
      import_line<T, Outside>(s, context, n, block, y);
    });
  });
}

void export_image(DType dtype, const ExportStep& s, const Context& context, Index item) {
  const Index y = item % s.image.height;
  const Index block = item / s.image.height % s.image.blocks();
  const Index n = item / s.image.height / s.image.blocks();
  with_type(dtype, [&]<class T>(T) {
    with_element(context.outputs[s.tensor], [&]<class Outside>(Outside) {
      export_line<T, Outside>(s, context, n, block, y);
    });
  });
}

}  // namespace rbln_vae
