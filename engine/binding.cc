#include "engine/binding.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/executor.h"
#include "engine/float_control.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace rbln_vae {
namespace {

using Weights = nb::ndarray<nb::pytorch, nb::ro, nb::c_contig, nb::device::cpu>;
using AnyTensor = nb::ndarray<nb::pytorch, nb::ndim<4>, nb::device::cpu>;
using Shape = std::array<Index, 4>;
using Sizes = std::array<Index, 6>;  // those of an Image, in their order

constexpr nb::dlpack::dtype kBFloat16{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat),
                                      16, 1};

// A plan, and the arrays whose memory its steps point into.
class BoundPlan {
 public:
  BoundPlan(const Kernels& kernels, Index arena_bytes, Shape input, Shape output)
      : plan(kernels, arena_bytes), input_shape(input), output_shape(output) {}

  // Weights of the type in which the kernels read them.
  const void* keep(const Weights& weights) {
    const bool wide = plan.kernels().dtype == DType::kFloat32;
    return keep(weights, wide ? nb::dtype<float>() : kBFloat16);
  }
  // Biases and the like, which are float32 for all kernels.
  const float* keep_floats(const Weights& weights) {
    return static_cast<const float*>(keep(weights, nb::dtype<float>()));
  }

  Plan plan;
  Shape input_shape;
  Shape output_shape;

 private:
  const void* keep(const Weights& weights, nb::dlpack::dtype expected) {
    if (weights.dtype() != expected) throw nb::type_error("weights of another type than the kernels");
    kept_.push_back(weights);
    return weights.data();
  }

  std::vector<Weights> kept_;
};

Image image(const Sizes& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

Image residual(const std::optional<Sizes>& sizes) { return sizes ? image(*sizes) : Image{}; }

// Whether rows of an image are rows of a tensor, from the first one given.
void require_rows(const char* what, const Shape& tensor, Index batch, const Sizes& image,
                  Index first_row) {
  if (tensor[0] != batch || tensor[1] != image[1] || tensor[3] != image[3] || first_row < 0 ||
      image[2] > tensor[2] - first_row) {
    throw nb::value_error((std::string(what) + " hasn't the shape of the plan").c_str());
  }
}

Index bytes(const Weights& weights) { return static_cast<Index>(weights.nbytes()); }

// Rounded to the nearest, whatever the caller has set: the result is part of the plan.
float single(double value) {
  const FloatControl control;
  // Neither may be moved before the register is set, or after it is set back.
  const volatile double from = value;
  const volatile float result = static_cast<float>(from);
  return result;
}

Index offset(const std::optional<Index>& given) { return given.value_or(kNone); }

Activation activation(const std::optional<std::string>& name) {
  if (!name) return Activation::kNone;
  if (*name == "silu") return Activation::kSilu;
  if (*name == "gelu") return Activation::kGelu;
  if (*name == "mish") return Activation::kMish;
  if (*name == "relu") return Activation::kRelu;
  throw nb::value_error(("unknown activation " + *name).c_str());
}

Tensor tensor(const AnyTensor& given, const Shape& expected, const char* what) {
  Tensor result;
  result.data = given.data();
  const nb::dlpack::dtype type = given.dtype();
  if (type == nb::dtype<float>()) {
    result.dtype = DType::kFloat32;
  } else if (type == kBFloat16) {
    result.dtype = DType::kBFloat16;
  } else if (type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float) &&
             type.bits == 16) {
    result.dtype = DType::kFloat16;
  } else {
    throw nb::type_error("tensors of float32, float16 or bfloat16 are expected");
  }
  for (std::size_t i = 0; i < 4; ++i) {
    result.shape[i] = static_cast<Index>(given.shape(i));
    result.strides[i] = given.stride(i);
    if (result.shape[i] != expected[i]) {
      throw nb::value_error((std::string(what) + " hasn't the shape of the plan").c_str());
    }
  }
  return result;
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::exception<OutOfMemory>(m, "OutOfMemoryError", PyExc_MemoryError);
  nb::exception<TimedOut>(m, "TimedOutError", PyExc_TimeoutError);
  nb::exception<ThreadsUnavailable>(m, "ThreadsUnavailableError", PyExc_RuntimeError);

  nb::class_<Costs>(m, "Costs",
                    "What parts of a convolution cost, in products that take as long.")
      .def_ro("product", &Costs::product, "A product, in those of float32.")
      .def_ro("norm", &Costs::norm, "Norm and activation of an element.")
      .def_ro("copy", &Costs::copy, "Copying an element.")
      .def_ro("weights", &Costs::weights, "Fetching a weight that isn't in the L2 cache.");

  nb::class_<WinogradCosts>(m, "WinogradCosts",
                            "What parts of Winograd's algorithm cost, in products of float32.")
      .def_ro("input", &WinogradCosts::input, "Transforming an input value.")
      .def_ro("output", &WinogradCosts::output, "Transforming an output value.")
      .def_ro("product", &WinogradCosts::product, "A product of transformed values.")
      .def_ro("kernel", &WinogradCosts::kernel, "A value of a transformed kernel.")
      .def_ro("others", &WinogradCosts::others, "All else, in products of float32.");

  nb::class_<Kernels>(m, "Kernels", "The kernels of one instruction set for one element type.")
      .def_prop_ro("isa", [](const Kernels& k) { return std::string(name(k.isa)); })
      .def_prop_ro("dtype",
                   [](const Kernels& k) {
                     return k.dtype == DType::kFloat32 ? "float32" : "bfloat16";
                   })
      .def_prop_ro(
          "multiplies_bfloat16", [](const Kernels& k) { return k.products == DType::kBFloat16; },
          "Whether products take bfloat16; elsewhere they are made in float32.")
      .def_ro("rows", &Kernels::rows, "Rows of output pixels that one product makes.")
      .def_ro("pixels", &Kernels::pixels, "Pixels of each of these rows.")
      .def_ro("panels", &Kernels::panels, "Panels of 16 output channels that one product makes.")
      .def_ro("overlaps", &Kernels::overlaps,
              "Whether a tile is loaded during the products of another.")
      .def_ro("tile_bytes", &Kernels::tile_bytes, "The most bytes for the input of a tile.")
      .def_ro("most_queries", &Kernels::most_queries, "The most queries of an attention item.")
      .def_ro("costs", &Kernels::costs)
      .def_prop_ro(
          "winograd",
          [](const Kernels& k) {
            return k.winograd_kernels == nullptr ? nullptr : &kWinogradCosts;
          },
          nb::rv_policy::reference, nb::sig("def winograd(self) -> WinogradCosts | None"),
          "What Winograd's algorithm costs, or None if these kernels don't have it.")
      .def(
          "prepare", [](const Kernels& k) { return prepare(k.isa); },
          "Asks the operating system for what these kernels need before their first run; False\n"
          "if it refuses, or this machine can't run them.")
      .def(
          "measure_limit",
          [](const Kernels& k, int threads, double seconds) {
            if (k.limit == nullptr || !prepare(k.isa)) return 0.0;
            const nb::gil_scoped_release release;
            std::mutex mutex;
            double total = 0;
            const auto measure = [&] {
              const double rate = k.limit(seconds);
              const std::lock_guard lock(mutex);
              total += rate;
            };
            std::vector<std::thread> workers = start_threads(threads - 1, measure, [] {});
            measure();
            for (std::thread& worker : workers) worker.join();
            return total;
          },
          "threads"_a, "seconds"_a,
          "Floating-point operations per second that so many threads can do together,\n"
          "measured for so many seconds; 0 where no limit is known.");

  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : isas()) names.push_back(name(isa));
        return names;
      },
      "The names of all instruction sets that the engine knows, the best last.");

  m.def(
      "built_kernels",
      [] {
        std::vector<const Kernels*> result;
        for (const Kernels& each : built_kernels()) result.push_back(&each);
        return result;
      },
      nb::rv_policy::reference,
      "All kernels in this build, the best last, those that this machine can't run too.");

  m.def(
      "all_kernels",
      [] {
        std::vector<const Kernels*> result;
        for (const Kernels* each : all_kernels()) result.push_back(each);
        return result;
      },
      nb::rv_policy::reference, "All kernels that this machine can run, the best last.");

  nb::class_<BoundPlan>(m, "Plan", "The steps of a run for one input shape.")
      .def(
          "__init__",
          [](BoundPlan* self, const Kernels& kernels, Index arena_bytes, Shape input_shape,
             Shape output_shape) {
            if (!prepare(kernels.isa)) {
              throw nb::value_error("the operating system doesn't let these kernels run");
            }
            new (self) BoundPlan(kernels, arena_bytes, input_shape, output_shape);
          },
          "kernels"_a, "arena_bytes"_a, "input_shape"_a, "output_shape"_a)
      .def_prop_ro("scratch_bytes", [](const BoundPlan& p) { return p.plan.scratch_bytes(); })
      .def(
          "import_image",
          [](BoundPlan& p, Index batch, Sizes to, Index first_row) {
            require_rows("the input", p.input_shape, batch, to, first_row);
            p.plan.add(ImportStep{batch, image(to), first_row});
          },
          nb::kw_only(), "batch"_a, "image"_a, "first_row"_a)
      .def(
          "export_image",
          [](BoundPlan& p, Index batch, Sizes from, Index first_row) {
            require_rows("the output", p.output_shape, batch, from, first_row);
            p.plan.add(ExportStep{batch, image(from), first_row});
          },
          nb::kw_only(), "batch"_a, "image"_a, "first_row"_a)
      .def(
          "move_rows",
          [](BoundPlan& p, Index batch, Sizes rows_of, Index from, Index rows) {
            p.plan.add(MoveRowsStep{batch, image(rows_of), from, rows});
          },
          nb::kw_only(), "batch"_a, "image"_a, "from_row"_a, "rows"_a)
      .def(
          "convolution",
          [](BoundPlan& p, Index batch, Sizes input, Sizes output, const Weights& bias,
             const std::optional<Weights>& weights, std::optional<Index> kernels,
             std::pair<Index, Index> kernel, Index stride, Index above, Index left, bool upsample,
             std::optional<Index> coefficients, const std::optional<std::string>& function,
             std::optional<Sizes> added, std::optional<Index> partials,
             std::pair<Index, Index> tile, Index splits, Index together) {
            ConvStep s;
            s.batch = batch;
            s.input = image(input);
            s.output = image(output);
            s.reading = {offset(coefficients), activation(function)};
            s.residual = residual(added);
            s.kernel_height = kernel.first;
            s.kernel_width = kernel.second;
            s.stride = stride;
            s.above = above;
            s.left = left;
            s.upsample = upsample;
            if (weights) s.weights = p.keep(*weights);
            s.kernels = offset(kernels);
            s.bias = p.keep_floats(bias);
            s.tile_height = tile.first;
            s.tile_width = tile.second;
            s.splits = splits;
            s.together = together;
            s.partials = offset(partials);
            p.plan.add(s, weights ? bytes(*weights) : 0, bytes(bias));
          },
          nb::kw_only(), "batch"_a, "input"_a, "output"_a, "bias"_a,
          "weights"_a = nb::none(), "kernels"_a = nb::none(), "kernel"_a,
          "stride"_a, "above"_a, "left"_a, "upsample"_a, "coefficients"_a.none(),
          "activation"_a.none(), "residual"_a.none(), "partials"_a.none(), "tile"_a, "splits"_a,
          "together"_a)
      .def(
          "winograd_kernels",
          [](BoundPlan& p, Index, const Weights& weights, Index panels, Index blocks,
             bool upsample, Index kernels) {
            p.plan.add(WinogradStep{p.keep(weights), panels, blocks, upsample, kernels},
                       bytes(weights));
          },
          nb::kw_only(), "batch"_a, "weights"_a, "panels"_a, "blocks"_a, "upsample"_a,
          "kernels"_a)
      .def(
          "statistics",
          [](BoundPlan& p, Index batch, Sizes input, std::pair<Index, Index> tile,
             Index partials) {
            p.plan.add(StatisticsStep{batch, image(input), tile.first, tile.second, partials});
          },
          nb::kw_only(), "batch"_a, "input"_a, "tile"_a, "partials"_a)
      .def(
          "norm",
          [](BoundPlan& p, Index batch, Index channels, Index groups, double eps,
             const Weights& weight, const Weights& bias, Index partials, Index partial_channels,
             std::pair<Index, Index> grid, std::pair<Index, Index> tile, Index points,
             Index coefficients) {
            NormStep s;
            s.batch = batch;
            s.channels = channels;
            s.groups = groups;
            s.eps = single(eps);
            s.weight = p.keep_floats(weight);
            s.bias = p.keep_floats(bias);
            s.partials = partials;
            s.partial_channels = partial_channels;
            s.grid_height = grid.first;
            s.grid_width = grid.second;
            s.tile_height = tile.first;
            s.tile_width = tile.second;
            s.points = points;
            s.coefficients = coefficients;
            p.plan.add(s, bytes(weight), bytes(bias));
          },
          nb::kw_only(), "batch"_a, "channels"_a, "groups"_a, "eps"_a, "weight"_a, "bias"_a,
          "partials"_a, "partial_channels"_a, "grid"_a, "tile"_a, "points"_a, "coefficients"_a)
      .def(
          "attention_pack",
          [](BoundPlan& p, Index batch, Sizes key, Sizes value, Index heads, Index packed_keys,
             Index packed_values) {
            p.plan.add(AttentionPackStep{batch, image(key), image(value), heads, packed_keys,
                                         packed_values});
          },
          nb::kw_only(), "batch"_a, "key"_a, "value"_a, "heads"_a, "packed_keys"_a,
          "packed_values"_a)
      .def(
          "attention",
          [](BoundPlan& p, Index batch, Sizes query, Sizes output, Index heads, double scale,
             Index packed_keys, Index packed_values, std::optional<Sizes> added,
             Index queries, Index keys) {
            p.plan.add(AttentionStep{batch, image(query), image(output), heads,
                                     single(scale), packed_keys, packed_values,
                                     residual(added), queries, keys});
          },
          nb::kw_only(), "batch"_a, "query"_a, "output"_a, "heads"_a, "scale"_a,
          "packed_keys"_a, "packed_values"_a, "residual"_a.none(), "queries"_a, "keys"_a)
      .def(
          "pointwise",
          [](BoundPlan& p, Index batch, Sizes input, Sizes output,
             std::optional<Index> coefficients, const std::optional<std::string>& function,
             double factor, bool upsample, Index above, Index left,
             std::optional<Sizes> added) {
            p.plan.add(PointwiseStep{batch, image(input), image(output),
                                     {offset(coefficients), activation(function)},
                                     single(factor), upsample, above, left,
                                     residual(added)});
          },
          nb::kw_only(), "batch"_a, "input"_a, "output"_a, "coefficients"_a.none(),
          "activation"_a.none(), "factor"_a, "upsample"_a, "above"_a, "left"_a,
          "residual"_a.none());

  nb::class_<Executor>(m, "Executor", "Threads and memory that the runs of a model share.")
      .def(nb::init<int>(), "threads"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("threads", &Executor::threads)
      .def_prop_ro("idle_bytes", &Executor::idle_bytes)
      .def("release", &Executor::release, "Gives memory that no run uses back to the system.")
      .def(
          "bytes", [](const Executor& e, const BoundPlan& p) { return e.bytes(p.plan); },
          "plan"_a, "Bytes of activations and scratch that a run of the plan takes.")
      .def(
          "run",
          [](Executor& e, const BoundPlan& p, const AnyTensor& input, const AnyTensor& output,
             double timeout, const std::optional<nb::typed<nb::callable, void()>>& ask, bool profile) {
            const Tensor from = tensor(input, p.input_shape, "the input");
            const Tensor to = tensor(output, p.output_shape, "the output");
            std::vector<StepTime> times;
            std::function<void()> ask_caller;
            if (ask) {
              ask_caller = [&ask] {
                const nb::gil_scoped_acquire acquire;
                if (PyErr_CheckSignals() != 0) throw nb::python_error();
                (*ask)();
              };
            }
            {
              const nb::gil_scoped_release release;
              e.run(p.plan, from, to, timeout, ask_caller, profile ? &times : nullptr);
            }
            std::vector<std::pair<double, double>> result;
            for (const StepTime& each : times) result.emplace_back(each.begin, each.end);
            return result;
          },
          "plan"_a, "input"_a, "output"_a, "timeout"_a, "ask"_a.none(), "profile"_a,
          "Runs a plan; gives the begin and end of each step where they are asked for.\n"
          "`ask` is called now and then, on the calling thread, where signals are looked for\n"
          "too; what it raises ends the run.");
}

}  // namespace rbln_vae
