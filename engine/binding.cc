#include "engine/binding.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/executor.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace rbln_vae {
namespace {

// Set at exit. A daemon thread may still be in a run then: if it called Python, the interpreter
// would end it, and with it the process, by an abort.
std::atomic<bool> interpreter_ends{false};

using Weights = nb::ndarray<nb::pytorch, nb::ro, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<nb::pytorch, float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyTensor = nb::ndarray<nb::pytorch, nb::ndim<4>, nb::device::cpu>;
using Flags = nb::ndarray<bool, nb::pytorch, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The types of elements, as tensors and as Python name them.
struct ElementType {
  DType dtype;
  nb::dlpack::dtype stored;
  const char* name;
};
constexpr nb::dlpack::dtype of_bits(nb::dlpack::dtype_code code, std::uint8_t bits) {
  return {static_cast<std::uint8_t>(code), bits, 1};
}
constexpr ElementType kElementTypes[] = {
    {DType::kFloat32, of_bits(nb::dlpack::dtype_code::Float, 32), "float32"},
    {DType::kBFloat16, of_bits(nb::dlpack::dtype_code::Bfloat, 16), "bfloat16"},
    {DType::kFloat16, of_bits(nb::dlpack::dtype_code::Float, 16), "float16"},
};
const ElementType& element_type(DType dtype) {
  return *std::find_if(std::begin(kElementTypes), std::end(kElementTypes),
                       [dtype](const ElementType& each) { return each.dtype == dtype; });
}

// A plan, and the arrays whose memory its steps point into.
class BoundPlan {
 public:
  BoundPlan(const Kernels& kernels, Index arena_bytes, const Shape& input, const Shape& output,
            Index inputs, Index outputs, Index state_bytes)
      : plan(kernels, arena_bytes, input, output, inputs, outputs, state_bytes) {}

  void add(ConvStep step, const Weights& bias, const std::optional<Weights>& weights,
           const std::optional<Weights>& gamma, const std::optional<Weights>& factor,
           const std::optional<Weights>& kernels) {
    step.bias = keep_floats(bias);
    step.weights = weights ? keep(*weights) : nullptr;
    step.gamma = gamma ? keep_floats(*gamma) : nullptr;
    step.kept = kernels ? keep_floats(*kernels) : nullptr;
    if (factor) {
      if (factor->size() != 1) throw nb::value_error("a factor that isn't one number");
      step.factor = *keep_floats(*factor);
    }
    plan.add(step, weights ? bytes(*weights) : 0, bytes(bias), gamma ? bytes(*gamma) : 0,
             kernels ? bytes(*kernels) : 0);
  }
  void add(WinogradStep step, const Weights& weights, const std::optional<Floats>& kernels) {
    step.weights = keep(weights);
    if (kernels) keep_floats(Weights(*kernels));
    step.kept = kernels ? kernels->data() : nullptr;
    plan.add(step, bytes(weights), kernels ? static_cast<Index>(kernels->nbytes()) : 0);
  }
  void add(NormStep step, const Weights& weight, const Weights& bias) {
    step.weight = keep_floats(weight);
    step.bias = keep_floats(bias);
    plan.add(step, bytes(weight), bytes(bias));
  }

  void add(ShuffleStep step, const Weights& order) {
    step.order = static_cast<const std::int32_t*>(keep(order, nb::dtype<std::int32_t>()));
    plan.add(step, bytes(order));
  }

  Plan plan;

 private:
  // Weights of the type in which the kernels read them.
  const void* keep(const Weights& weights) {
    return keep(weights, element_type(plan.kernels().dtype).stored);
  }
  // Biases and the like, which are float32 for all kernels.
  const float* keep_floats(const Weights& weights) {
    return static_cast<const float*>(keep(weights, nb::dtype<float>()));
  }
  const void* keep(const Weights& weights, nb::dlpack::dtype expected) {
    if (weights.dtype() != expected) {
      throw nb::type_error("weights of another type than the kernels");
    }
    kept_.push_back(weights);
    return weights.data();
  }
  static Index bytes(const Weights& weights) { return static_cast<Index>(weights.nbytes()); }

  std::vector<Weights> kept_;
};

template <class S, class T>
struct Field {
  const char* name;
  T S::*member;
};
template <class S, class T>
Field(const char*, T S::*) -> Field<S, T>;

// A plain struct: its fields are attributes, and arguments of the constructor by keyword.
template <class S, class... T>
void bind_struct(nb::module_& m, const char* name, const char* doc, Field<S, T>... fields) {
  nb::class_<S> bound(m, name, doc);
  bound.def(
      "__init__",
      [... members = fields.member](S* self, T... values) {
        new (self) S{};
        ((self->*members = values), ...);
      },
      nb::kw_only(), (nb::arg(fields.name) = S{}.*fields.member)...);
  (bound.def_rw(fields.name, fields.member), ...);
}

void bind_steps(nb::module_& m) {
  m.attr("NONE") = kNone;
  nb::enum_<Activation>(m, "Activation", "A function of each element.")
      .value("none", Activation::kNone)
      .value("silu", Activation::kSilu)
      .value("gelu", Activation::kGelu)
      .value("mish", Activation::kMish)
      .value("relu", Activation::kRelu)
      .value("tanh", Activation::kTanh);
  bind_struct(m, "Image", "An image in the arena, or some rows of one.",
              Field{"offset", &Image::offset}, Field{"channels", &Image::channels},
              Field{"height", &Image::height}, Field{"width", &Image::width},
              Field{"row", &Image::row}, Field{"sample", &Image::sample});
  bind_struct(m, "Reading", "What is done with an image while it is read.",
              Field{"coefficients", &Reading::coefficients},
              Field{"activation", &Reading::activation});
  bind_struct(m, "ImportStep", "From the caller's input to an image.",
              Field{"batch", &ImportStep::batch}, Field{"image", &ImportStep::image},
              Field{"first_row", &ImportStep::first_row}, Field{"tensor", &ImportStep::tensor});
  bind_struct(m, "ExportStep", "From an image to the caller's output.",
              Field{"batch", &ExportStep::batch}, Field{"image", &ExportStep::image},
              Field{"first_row", &ExportStep::first_row}, Field{"tensor", &ExportStep::tensor});
  bind_struct(m, "ConvStep", "A convolution over tiles of an image.",
              Field{"batch", &ConvStep::batch}, Field{"input", &ConvStep::input},
              Field{"earlier", &ConvStep::earlier}, Field{"left_out", &ConvStep::left_out},
              Field{"stacked", &ConvStep::stacked}, Field{"at_once", &ConvStep::at_once},
              Field{"over_clip", &ConvStep::over_clip},
              Field{"output", &ConvStep::output}, Field{"reading", &ConvStep::reading},
              Field{"eps", &ConvStep::eps}, Field{"residual", &ConvStep::residual},
              Field{"output_activation", &ConvStep::output_activation},
              Field{"kernel_height", &ConvStep::kernel_height},
              Field{"kernel_width", &ConvStep::kernel_width},
              Field{"stride", &ConvStep::stride}, Field{"above", &ConvStep::above},
              Field{"left", &ConvStep::left}, Field{"upsample", &ConvStep::upsample},
              Field{"doubles", &ConvStep::doubles}, Field{"kernels", &ConvStep::kernels},
              Field{"tile_height", &ConvStep::tile_height},
              Field{"tile_width", &ConvStep::tile_width},
              Field{"cell_height", &ConvStep::cell_height},
              Field{"cell_width", &ConvStep::cell_width},
              Field{"image_cells", &ConvStep::image_cells}, Field{"splits", &ConvStep::splits},
              Field{"together", &ConvStep::together}, Field{"partials", &ConvStep::partials});
  bind_struct(m, "WinogradStep", "Transforms kernels for Winograd's algorithm.",
              Field{"panels", &WinogradStep::panels}, Field{"blocks", &WinogradStep::blocks},
              Field{"skipped", &WinogradStep::skipped}, Field{"phases", &WinogradStep::phases},
              Field{"stride", &WinogradStep::stride}, Field{"at_once", &WinogradStep::at_once},
              Field{"kernels", &WinogradStep::kernels});
  bind_struct(m, "StatisticsStep", "Sums of an image that no convolution summed.",
              Field{"batch", &StatisticsStep::batch}, Field{"input", &StatisticsStep::input},
              Field{"cell_height", &StatisticsStep::cell_height},
              Field{"cell_width", &StatisticsStep::cell_width},
              Field{"partials", &StatisticsStep::partials});
  bind_struct(m, "NormStep", "From the sums of cells to the coefficients of a group norm.",
              Field{"batch", &NormStep::batch}, Field{"channels", &NormStep::channels},
              Field{"groups", &NormStep::groups}, Field{"over_clip", &NormStep::over_clip},
              Field{"eps", &NormStep::eps},
              Field{"partials", &NormStep::partials},
              Field{"partial_channels", &NormStep::partial_channels},
              Field{"grid_height", &NormStep::grid_height},
              Field{"grid_width", &NormStep::grid_width},
              Field{"cell_height", &NormStep::cell_height},
              Field{"cell_width", &NormStep::cell_width}, Field{"points", &NormStep::points},
              Field{"coefficients", &NormStep::coefficients});
  bind_struct(m, "AttentionPackStep", "Rearranges keys and values for attention.",
              Field{"batch", &AttentionPackStep::batch}, Field{"key", &AttentionPackStep::key},
              Field{"value", &AttentionPackStep::value},
              Field{"heads", &AttentionPackStep::heads},
              Field{"packed_keys", &AttentionPackStep::packed_keys},
              Field{"packed_values", &AttentionPackStep::packed_values});
  bind_struct(m, "AttentionStep", "Attention, over packed keys and values.",
              Field{"batch", &AttentionStep::batch}, Field{"query", &AttentionStep::query},
              Field{"output", &AttentionStep::output}, Field{"heads", &AttentionStep::heads},
              Field{"scale", &AttentionStep::scale},
              Field{"packed_keys", &AttentionStep::packed_keys},
              Field{"packed_values", &AttentionStep::packed_values},
              Field{"residual", &AttentionStep::residual},
              Field{"queries", &AttentionStep::queries}, Field{"keys", &AttentionStep::keys});
  bind_struct(m, "ModulateStep", "The product with one image plus another.",
              Field{"batch", &ModulateStep::batch}, Field{"input", &ModulateStep::input},
              Field{"output", &ModulateStep::output},
              Field{"coefficients", &ModulateStep::coefficients},
              Field{"scale", &ModulateStep::scale}, Field{"shift", &ModulateStep::shift},
              Field{"factor", &ModulateStep::factor});
  bind_struct(m, "PointwiseStep", "The operations that no convolution took in.",
              Field{"batch", &PointwiseStep::batch}, Field{"input", &PointwiseStep::input},
              Field{"output", &PointwiseStep::output},
              Field{"reading", &PointwiseStep::reading},
              Field{"factor", &PointwiseStep::factor},
              Field{"offset", &PointwiseStep::offset},
              Field{"upsample", &PointwiseStep::upsample},
              Field{"above", &PointwiseStep::above}, Field{"left", &PointwiseStep::left},
              Field{"residual", &PointwiseStep::residual});
  bind_struct(m, "ShuffleStep", "Moves channels, or pixels between channels and cells.",
              Field{"batch", &ShuffleStep::batch}, Field{"input", &ShuffleStep::input},
              Field{"output", &ShuffleStep::output});
  bind_struct(m, "MoveRowsStep", "Moves rows of an image to its first.",
              Field{"batch", &MoveRowsStep::batch}, Field{"image", &MoveRowsStep::image},
              Field{"from_row", &MoveRowsStep::from_row}, Field{"rows", &MoveRowsStep::rows});
}

// Lets a plan take steps that need no weights.
template <class... S>
void bind_add(nb::class_<BoundPlan>& bound) {
  (bound.def("add", [](BoundPlan& p, const S& step) { p.plan.add(step); }, "step"_a), ...);
}

// A tensor of a run. `shown` is the type of the values that levels show.
Tensor tensor(const AnyTensor& given, const Shape& expected, const char* what,
              DType shown = DType::kFloat32) {
  Tensor result;
  result.data = given.data();
  const auto type = std::find_if(
      std::begin(kElementTypes), std::end(kElementTypes),
      [&given](const ElementType& each) { return each.stored == given.dtype(); });
  if (given.dtype() == nb::dtype<std::uint8_t>()) {
    result.levels = true;
    result.dtype = shown;
  } else if (type != std::end(kElementTypes)) {
    result.dtype = type->dtype;
  } else {
    throw nb::type_error("tensors of float32, float16, bfloat16 or uint8 are expected");
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
  nb::module_::import_("atexit").attr("register")(
      nb::cpp_function([] { interpreter_ends = true; }));
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
      .def_ro("kernel", &WinogradCosts::kernel, "Computing a value of a transformed kernel.")
      .def_ro("fetch", &WinogradCosts::fetch, "Reading one that was kept, from memory.")
      .def_ro("others", &WinogradCosts::others, "All else, in products of float32.");

  nb::class_<DoublingCosts>(m, "DoublingCosts",
                            "What parts of the algorithm for doubling cost, in own products.")
      .def_ro("input", &DoublingCosts::input, "Transforming an input value.")
      .def_ro("output", &DoublingCosts::output, "Transforming an output value.")
      .def_ro("product", &DoublingCosts::product, "A product of transformed values.");

  nb::class_<Kernels>(m, "Kernels", "The kernels of one instruction set for one element type.")
      .def_prop_ro("isa", [](const Kernels& k) { return std::string(name(k.isa)); })
      .def_prop_ro("dtype",
                   [](const Kernels& k) { return std::string(element_type(k.dtype).name); })
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
      .def_ro("doubling", &Kernels::doubling, "What convolutions that double an image cost.")
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
            if (!prepare(k.isa)) return 0.0;
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
          "measured for so many seconds; 0 where the operating system refuses.");

  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : isas()) names.push_back(name(isa));
        return names;
      },
      "The names of all instruction sets that the engine knows, the best last.");

  m.def(
      "left_out",
      [] {
        std::vector<std::string> names;
        for (const Isa isa : isas()) {
          if (supported(isa) && !available(isa)) names.push_back(name(isa));
        }
        return names;
      },
      "The instruction sets of this machine whose kernels this build leaves out, the best last.");

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

  m.def(
      "allocate",
      [](std::size_t count) {
        auto memory = std::make_unique<Arena>(count * sizeof(float));
        auto* const floats = reinterpret_cast<float*>(memory->data());
        const nb::capsule owner(memory.get(), [](void* p) noexcept {
          delete static_cast<Arena*>(p);
        });
        memory.release();
        return Floats(floats, {count}, owner);
      },
      "count"_a, "So many zeros, in memory as runs have it: in large pages, where there are any.");

  bind_steps(m);

  nb::class_<BoundPlan> plan(m, "Plan", "The steps of a run for one input shape.");
  plan.def(
          "__init__",
          [](BoundPlan* self, const Kernels& kernels, Index arena_bytes, const Shape& input_shape,
             const Shape& output_shape, Index inputs, Index outputs, Index state_bytes) {
            if (!prepare(kernels.isa)) {
              throw nb::value_error("the operating system doesn't let these kernels run");
            }
            new (self) BoundPlan(kernels, arena_bytes, input_shape, output_shape, inputs, outputs,
                                 state_bytes);
          },
          "kernels"_a, "arena_bytes"_a, "input_shape"_a, "output_shape"_a, "inputs"_a = 1,
          "outputs"_a = 1, "state_bytes"_a = 0)
      .def_prop_ro("scratch_bytes", [](const BoundPlan& p) { return p.plan.scratch_bytes(); })
      .def_prop_ro(
          "items",
          [](const BoundPlan& p) {
            std::vector<Index> items;
            for (std::size_t step = 0; step < p.plan.steps().size(); ++step) {
              items.push_back(p.plan.items(step));
            }
            return items;
          },
          "The number of items of each step.")
      .def("add",
           nb::overload_cast<ConvStep, const Weights&, const std::optional<Weights>&,
                             const std::optional<Weights>&, const std::optional<Weights>&,
                             const std::optional<Weights>&>(&BoundPlan::add),
           "step"_a, "bias"_a, "weights"_a = nb::none(), "gamma"_a = nb::none(),
           "factor"_a = nb::none(), "kernels"_a = nb::none(),
           "Adds a step; weights are as `packing.pack` makes them, and kept by the plan. Kernels\n"
           "that were transformed before are read instead of those in the arena.")
      .def("add",
           nb::overload_cast<WinogradStep, const Weights&, const std::optional<Floats>&>(
               &BoundPlan::add),
           "step"_a, "weights"_a, "kernels"_a = nb::none(),
           "Adds a step that writes to the arena, or to the given memory.")
      .def("add", nb::overload_cast<NormStep, const Weights&, const Weights&>(&BoundPlan::add),
           "step"_a, "weight"_a, "bias"_a)
      .def("add", nb::overload_cast<ShuffleStep, const Weights&>(&BoundPlan::add), "step"_a,
           "order"_a);
  bind_add<ImportStep, ExportStep, StatisticsStep, AttentionPackStep, AttentionStep,
           ModulateStep, PointwiseStep, MoveRowsStep>(plan);

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
          [](Executor& e, const BoundPlan& p, const std::vector<AnyTensor>& inputs,
             const std::vector<AnyTensor>& outputs, double timeout,
             const std::optional<nb::typed<nb::callable, void(Index)>>& ask,
             bool profile,
             const std::optional<nb::typed<nb::callable, void(Index, Index)>>& on_rows,
             const std::optional<Flags>& finite, const std::optional<Floats>& state) {
            if (static_cast<Index>(inputs.size()) != p.plan.inputs() ||
                static_cast<Index>(outputs.size()) != p.plan.outputs()) {
              throw nb::value_error("as many inputs and outputs as the plan has are expected");
            }
            if ((state ? static_cast<Index>(state->nbytes()) : 0) < p.plan.state_bytes()) {
              throw nb::value_error("a state as large as that of the plan is expected");
            }
            std::vector<Tensor> from, to;
            for (const AnyTensor& each : inputs) {
              from.push_back(tensor(each, p.plan.input_shape(), "the input"));
            }
            for (const AnyTensor& each : outputs) {
              to.push_back(tensor(each, p.plan.output_shape(), "the output", from[0].dtype));
            }
            if (finite) {
              for (Tensor& each : to) {
                if (static_cast<Index>(finite->shape(0)) != each.shape[0]) {
                  throw nb::value_error("`finite` hasn't an element for each image");
                }
                each.finite = finite->data();
              }
            }
            auto* const kept = state ? reinterpret_cast<std::byte*>(state->data()) : nullptr;
            std::vector<StepTime> times;
            std::vector<Index> overflowed;
            std::function<void(Index)> ask_caller;
            if (ask) {
              ask_caller = [&ask](Index done) {
                if (interpreter_ends) return;
                const nb::gil_scoped_acquire acquire;
                if (PyErr_CheckSignals() != 0) throw nb::python_error();
                (*ask)(done);
              };
            }
            std::function<void(Index, Index)> rows_finished;
            if (on_rows) {
              rows_finished = [&on_rows](Index first, Index rows) {
                if (interpreter_ends) return;
                const nb::gil_scoped_acquire acquire;
                (*on_rows)(first, rows);
              };
            }
            {
              const nb::gil_scoped_release release;
              overflowed = e.run(p.plan, from, to, kept, timeout, ask_caller, rows_finished,
                                 profile ? &times : nullptr);
            }
            std::vector<std::pair<double, double>> spans;
            for (const StepTime& each : times) spans.emplace_back(each.begin, each.end);
            return std::make_pair(std::move(overflowed), std::move(spans));
          },
          "plan"_a, "inputs"_a, "outputs"_a, "timeout"_a, "ask"_a.none(), "profile"_a,
          "on_rows"_a.none() = nb::none(), "finite"_a.none() = nb::none(),
          "state"_a.none() = nb::none(),
          "Runs a plan. Gives the numbers of the images with values beyond the range of the\n"
          "type in which images are stored, whose results are not valid; and where they are\n"
          "asked for the begin and end of each step that was run.\n"
          "Tensors of uint8 hold levels of pictures; those of the output show values in the\n"
          "dtype of the input.\n"
          "`ask` is called now and then, on the calling thread, with the number of items that are\n"
          "done; signals are looked for then, too. What it raises ends the run.\n"
          "`on_rows` is called there with the first row and the number of rows when these are\n"
          "finished in all images of the output; what it raises ends the run.\n"
          "`finite` has an element for each image, which is cleared if levels of the image show\n"
          "a value that isn't finite.\n"
          "`state` is that of a video: zeros from `allocate` at first, then what runs leave in it.");
}

}  // namespace rbln_vae
