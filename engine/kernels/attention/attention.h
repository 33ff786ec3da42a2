// Attention between all pixels of an image, for one instruction set.
//
// Keys and values are first packed like the weights of a convolution. An item is a block of
// queries of one head. It goes over the keys in blocks with the online softmax: a running
// maximum and sum for each query, so that the whole matrix is never in memory.
#pragma once

#include <cmath>
#include <cstring>

#include "engine/kernels/simd/instruction_set.h"
#include "engine/kernels/simd/range.h"
#include "engine/steps.h"

namespace rbln_vae {

static inline Index element_at(const Image& image, Index n, Index channel, Index pixel) {
  return image.at(n, channel / kBlock, pixel / image.width) + pixel % image.width * kBlock +
         channel % kBlock;
}

// Calls `use(i, pixels)` for each part of `count` pixels that lies in one row.
template <class Use>
static inline void each_row(const Image& image, Index first, Index count, Use&& use) {
  for (Index i = 0; i < count;) {
    const Index pixels = smaller(count - i, image.width - (first + i) % image.width);
    use(i, pixels);
    i += pixels;
  }
}

template <InstructionSet Simd>
class AttentionPack {
  using T = typename Simd::T;

 public:
  static void run(const AttentionPackStep& s, const Context& context, Index item) {
    const Index block = item % s.key_blocks();
    const Index head_item = item / s.key_blocks();  // n * heads + head
    const Index n = head_item / s.heads;
    const Index head = head_item % s.heads;
    const Index first = block * kBlock;
    const Index count = smaller(kBlock, s.key.pixels() - first);
    const T* none = nullptr;

    // Keys: the outputs of the product are keys, and it sums over channels.
    const Index channels = s.key_channels();
    const Index channel_blocks = ceil_div(channels, kBlock);
    const T* key = reinterpret_cast<const T*>(context.at(s.key.offset));
    T* keys = reinterpret_cast<T*>(context.at(s.packed_keys)) +
              (head_item * s.key_blocks() + block) * 2 * channel_blocks * kPanelBlock;
    clear(keys, 2 * channel_blocks * kPanelBlock);
    for (Index begin = 0; begin < channels;) {
      // Channels that are contiguous in the image and in the panel.
      const Index channel = head * channels + begin;
      const Index together = smaller(smaller(channels - begin, kBlock - channel % kBlock),
                                     kBlock - begin % kBlock);
      each_row(s.key, first, count, [&](Index part, Index pixels) {
        const T* from = key + element_at(s.key, n, channel, first + part);
        for (Index i = part; i < part + pixels; ++i, from += kBlock) {
          T* to = keys + (i / kPanel * channel_blocks + begin / kBlock) * kPanelBlock;
          for (Index c = 0; c < together; ++c) {
            to[panel_index(none, begin % kBlock + c, i % kPanel)] = from[c];
          }
        }
      });
      begin += together;
    }

    // Values: the outputs of the product are channels, and it sums over keys.
    const Index outputs = s.value_channels();
    const Index panels = ceil_div(outputs, kPanel);
    const T* value = reinterpret_cast<const T*>(context.at(s.value.offset));
    T* values = reinterpret_cast<T*>(context.at(s.packed_values)) +
                (head_item * panels * s.key_blocks() + block) * kPanelBlock;
    for (Index panel = 0; panel < panels; ++panel) {
      T* to = values + panel * s.key_blocks() * kPanelBlock;
      clear(to, kPanelBlock);
      const Index width = smaller(kPanel, outputs - panel * kPanel);
      for (Index begin = 0; begin < width;) {
        const Index channel = head * outputs + panel * kPanel + begin;
        const Index together = smaller(width - begin, kBlock - channel % kBlock);
        each_row(s.value, first, count, [&](Index part, Index pixels) {
          const T* from = value + element_at(s.value, n, channel, first + part);
          for (Index i = part; i < part + pixels; ++i, from += kBlock) {
            for (Index c = 0; c < together; ++c) {
              to[panel_index(none, i, begin + c)] = from[c];
            }
          }
        });
        begin += together;
      }
    }
  }

 private:
  static void clear(T* to, Index count) {
    std::memset(static_cast<void*>(to), 0, static_cast<std::size_t>(count) * sizeof(T));
  }
};

template <InstructionSet Simd>
class Attention {
  using T = typename Simd::T;
  using Scratch = typename Simd::Scratch;
  using Vector = typename Simd::Vector;

  // Queries of one product; the scratch is padded to a multiple.
  static constexpr Index kTogether = Simd::kMaxRows * Simd::kMaxPixels;

  // The layout of an item's scratch.
  struct Layout {
    Index rows;    // queries, padded
    Index blocks;  // of channels
    Index panels;  // of output channels
    Index keys;
    Index query, weights, logits, output, maximum, sum, end;

    explicit Layout(const AttentionStep& s) {
      rows = ceil_div(s.queries, kTogether) * kTogether + kTogether;
      blocks = ceil_div(s.key_channels(), kBlock);
      panels = ceil_div(s.value_channels(), kPanel);
      keys = s.keys;
      Index at = 0;
      const auto take = [&at](Index bytes) {
        const Index begin = at;
        at += ceil_div(bytes, 64) * 64;
        return begin;
      };
      query = take(blocks * rows * kBlock * Index{sizeof(Scratch)});
      weights = take(keys * rows * Index{sizeof(Scratch)});
      logits = take(keys * rows * Index{sizeof(float)});
      output = take(panels * kPanel * rows * Index{sizeof(float)});
      maximum = take(rows * Index{sizeof(float)});
      sum = take(rows * Index{sizeof(float)});
      end = at;
    }
  };

 public:
  static Index scratch_bytes(const AttentionStep& s) { return Layout(s).end; }

  static void run(const AttentionStep& s, const Context& context, Index item) {
    Attention(s, context, item).run();
  }

 private:
  Attention(const AttentionStep& s, const Context& context, Index item)
      : s_(s), context_(context), layout_(s) {
    first_ = item % s.query_parts() * s.queries;
    count_ = smaller(s.queries, s.query.pixels() - first_);
    head_item_ = item / s.query_parts();
    n_ = head_item_ / s.heads;
    head_ = head_item_ % s.heads;
    // exp(x * scale) is 2 to the power of x * factor.
    factor_ = static_cast<float>(s.scale) * 1.44269504088896341f;
  }

  float* floats(Index offset) const {
    return reinterpret_cast<float*>(context_.scratch + offset);
  }
  Scratch* elements(Index offset) const {
    return reinterpret_cast<Scratch*>(context_.scratch + offset);
  }

  void run() {
    Simd::enter();
    load_queries();
    for (Index i = 0; i < count_; ++i) {
      floats(layout_.maximum)[i] = -INFINITY;
      floats(layout_.sum)[i] = 0.0f;
    }
    const Index pixels = s_.query.pixels();
    for (Index key = 0; key < pixels && !interrupted<Simd>(context_); key += s_.keys) {
      const Index keys = smaller(s_.keys, pixels - key);
      multiply_keys(key, keys);
      soften(keys, key == 0);
      multiply_values(key, keys, key == 0);
    }
    store();
    Simd::leave();
  }

  void load_queries() {
    const Index channels = s_.key_channels();
    const T* query = reinterpret_cast<const T*>(context_.at(s_.query.offset));
    Scratch* to = elements(layout_.query);
    const Index begin = head_ * channels;
    if (begin % kBlock == 0 && (channels % kBlock == 0 || s_.heads == 1)) {
      // Whole blocks, in which padding channels are already zero.
      for (Index block = 0; block < layout_.blocks; ++block) {
        each_row(s_.query, first_, count_, [&](Index part, Index pixels) {
          const T* from = query + element_at(s_.query, n_, begin + block * kBlock, first_ + part);
          Scratch* line = to + (block * layout_.rows + part) * kBlock;
          for (Index i = 0; i < pixels * kBlock; i += kPanel) {
            put<Simd>(line + i, Simd::load_elements(from + i));
          }
        });
      }
      return;
    }
    std::memset(static_cast<void*>(to), 0,
                static_cast<std::size_t>(layout_.blocks * layout_.rows * kBlock) * sizeof(Scratch));
    for (Index c = 0; c < channels; ++c) {
      for (Index i = 0; i < count_; ++i) {
        from_float(to_float(query[element_at(s_.query, n_, begin + c, first_ + i)]),
                   to[(c / kBlock * layout_.rows + i) * kBlock + c % kBlock]);
      }
    }
  }

  // Calls `use(panel, first query, queries, sums)` for products of all queries.
  template <class Use>
  void multiply(const Scratch* a, Index blocks, Index last_channels, const T* b, Index panel_step,
                Index panels, Use&& use) {
    const Index offset = 0;
    Gemm<T, Scratch> g;
    g.row_step = Simd::kMaxPixels * kBlock;
    g.pixel_step = kBlock;
    g.taps = &offset;
    g.tap_count = 1;
    g.blocks = blocks;
    g.plane = layout_.rows * kBlock;
    g.last_channels = last_channels;
    g.panel_step = panel_step;
    g.c = sums_;
    const Index chunks = ceil_div(count_, kTogether);
    for (Index panel = 0; panel < panels; panel += Simd::kMaxPanels) {
      g.b = b + panel * panel_step;
      g.panels = smaller(Simd::kMaxPanels, panels - panel);
      const T* const next = g.b + g.panels * panel_step;
      const Index left = panels - panel - g.panels;
      for (Index chunk = 0; chunk < chunks; ++chunk) {
        // The next panels arrive while these are multiplied.
        g.ahead = chunk < smaller(g.panels, left) ? next + chunk * panel_step : nullptr;
        // Even parts, or whole tiles and a rest.
        const Index begin =
            Simd::kWholeTiles ? chunk * kTogether : count_ * chunk / chunks;
        const Index end = Simd::kWholeTiles ? smaller(begin + kTogether, count_)
                                            : count_ * (chunk + 1) / chunks;
        g.rows = ceil_div(end - begin, Simd::kMaxPixels);
        g.pixels = g.rows > 1 ? Simd::kMaxPixels : end - begin;
        g.a = a + begin * kBlock;
        Simd::gemm(g);
        for (Index p = 0; p < g.panels; ++p) {
          use(panel + p, begin, end - begin,
              static_cast<const float*>(sums_ + p * kTogether * kPanel));
        }
      }
    }
  }

  void multiply_keys(Index key, Index keys) {
    const Index step = layout_.blocks * kPanelBlock;
    const T* packed = reinterpret_cast<const T*>(context_.at(s_.packed_keys)) +
                      (head_item_ * s_.key_blocks() * 2 + key / kPanel) * step;
    float* logits = floats(layout_.logits);
    multiply(elements(layout_.query), layout_.blocks,
             s_.key_channels() - (layout_.blocks - 1) * kBlock, packed, step,
             ceil_div(keys, kBlock) * 2,
             [&](Index panel, Index begin, Index count, const float* sums) {
               for (Index i = 0; i < count; ++i) {
                 Simd::store(logits + (begin + i) * layout_.keys + panel * kPanel,
                             Simd::load(sums + i * kPanel));
               }
             });
  }

  // Turns logits into weights relative to the running maximum, and rescales the earlier sums if
  // the maximum has changed.
  void soften(Index keys, bool first) {
    const Index padded = ceil_div(keys, kBlock) * kBlock;
    Scratch* weights = elements(layout_.weights);
    for (Index i = 0; i < count_; ++i) {
      float* logits = floats(layout_.logits) + i * layout_.keys;
      for (Index k = keys; k < padded; ++k) logits[k] = -INFINITY;
      Vector most = Simd::load(logits);
      for (Index k = kPanel; k < padded; k += kPanel) {
        most = Simd::maximum(most, Simd::load(logits + k));
      }
      float& maximum = floats(layout_.maximum)[i];
      const float before = maximum;
      const float here = Simd::largest(most);
      maximum = here > before ? here : before;
      const Vector factor = Simd::set(factor_);
      const Vector origin = Simd::set(maximum);
      Vector total = Simd::set(0.0f);
      for (Index k = 0; k < padded; k += kPanel) {
        // Subtract first: the rounded product of the maximum and the factor would differ between
        // blocks of keys.
        const Vector x = Simd::exp2(
            Simd::multiply(Simd::subtract(Simd::load(logits + k), origin), factor));
        total = Simd::add(total, x);
        put<Simd>(weights + (k / kBlock * layout_.rows + i) * kBlock + k % kBlock, x);
      }
      float& sum = floats(layout_.sum)[i];
      if (first) {
        sum = Simd::sum(total);
        continue;
      }
      if (maximum != before) {
        alignas(64) float lanes[kPanel];
        Simd::store(lanes, Simd::exp2(Simd::set((before - maximum) * factor_)));
        sum *= lanes[0];
        const Vector fade = Simd::load(lanes);
        float* output = floats(layout_.output) + i * kPanel;
        for (Index panel = 0; panel < layout_.panels; ++panel) {
          float* at = output + panel * layout_.rows * kPanel;
          Simd::store(at, Simd::multiply(Simd::load(at), fade));
        }
      }
      sum += Simd::sum(total);
    }
  }

  void multiply_values(Index key, Index keys, bool first) {
    const Index step = s_.key_blocks() * kPanelBlock;
    const T* packed = reinterpret_cast<const T*>(context_.at(s_.packed_values)) +
                      head_item_ * layout_.panels * step + key / kBlock * kPanelBlock;
    multiply(elements(layout_.weights), ceil_div(keys, kBlock), kBlock, packed, step,
             layout_.panels, [&](Index panel, Index begin, Index count, const float* sums) {
               float* to = floats(layout_.output) + (panel * layout_.rows + begin) * kPanel;
               for (Index i = 0; i < count; ++i) {
                 Vector v = Simd::load(sums + i * kPanel);
                 if (!first) v = Simd::add(v, Simd::load(to + i * kPanel));
                 Simd::store(to + i * kPanel, v);
               }
             });
  }

  void store() {
    const Index channels = s_.value_channels();
    T* output = reinterpret_cast<T*>(context_.at(s_.output.offset));
    const T* residual =
        s_.residual.channels == 0
            ? nullptr
            : reinterpret_cast<const T*>(context_.at(s_.residual.offset));
    Vector largest = Simd::set(0.0f);
    for (Index panel = 0; panel < layout_.panels; ++panel) {
      const Index channel = head_ * channels + panel * kPanel;
      const Index lanes = smaller(kPanel, channels - panel * kPanel);
      for (Index i = 0; i < count_; ++i) {
        const float* sums = floats(layout_.output) + (panel * layout_.rows + i) * kPanel;
        Vector v = Simd::multiply(Simd::load(sums), Simd::set(1.0f / floats(layout_.sum)[i]));
        const Index at = element_at(s_.output, n_, channel, first_ + i);
        if (lanes == kPanel && channel % kPanel == 0) {
          if (residual != nullptr) {
            const Index from = element_at(s_.residual, n_, channel, first_ + i);
            v = Simd::add(v, Simd::load_elements(residual + from));
          }
          Simd::store_elements(output + at, v);
          see<Simd>(v, largest);
          continue;
        }
        alignas(64) float values[kPanel];
        Simd::store(values, v);
        for (Index c = 0; c < lanes; ++c) {
          const Index each = element_at(s_.output, n_, channel + c, first_ + i);
          const float add =
              residual == nullptr
                  ? 0.0f
                  : to_float(residual[element_at(s_.residual, n_, channel + c, first_ + i)]);
          values[c] += add;
          from_float(values[c], output[each]);
        }
        for (Index c = lanes; c < kPanel; ++c) values[c] = 0.0f;
        see<Simd>(Simd::load(values), largest);
      }
    }
    report<Simd>(largest, context_, n_);
    if (head_ + 1 < s_.heads) return;
    // Padding channels of the last block must read as zero.
    for (Index c = s_.output.channels; c < s_.output.blocks() * kBlock; ++c) {
      for (Index i = 0; i < count_; ++i) {
        from_float(0.0f, output[element_at(s_.output, n_, c, first_ + i)]);
      }
    }
  }

  const AttentionStep& s_;
  const Context& context_;
  Layout layout_;
  Index n_;
  Index head_;
  Index head_item_;
  Index first_;
  Index count_;
  float factor_;
  alignas(64) float sums_[Simd::kMaxPanels * kTogether * kPanel];
};

}  // namespace rbln_vae
