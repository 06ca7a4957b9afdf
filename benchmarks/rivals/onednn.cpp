// oneDNN's batch normalisation (with its fused ReLU) behind a plain C interface, for the benchmarks to time beside
// ours.
//
// All that oneDNN allows to be made once is made in `onednn_new`: primitives, the workspace that carries the ReLU's
// bits to backward, and memories. What is timed is `onednn_forward` and `onednn_backward`: one execution each, and the
// wait for it. In a plain layout the caller's tensors are used where they lie; in the blocked one the caller's are
// reordered into it beforehand (`onednn_load`) and the results back for a look at them (`onednn_store`), neither of
// them timed.
//
// Threads. libdnnl and torch both use libgomp, under the same soname, so the second to be loaded gets the copy of the
// first: one runtime, one pool, and torch.set_num_threads holds for both. The loader of this file (onednn.py) checks
// that, and refuses otherwise: with two runtimes the idle pool of one spins on the cores of the other after each call.
#include <dnnl.hpp>
#include <omp.h>

#include <cstdint>
#include <exception>
#include <string>
#include <unordered_map>

static_assert(DNNL_VERSION_MAJOR == 2, "written for oneDNN 2, whose primitives have operation descriptors");

namespace {

using dnnl::memory;
using Tag = memory::format_tag;
using Arguments = std::unordered_map<int, memory>;

// In the order of `FORMATS` and `DTYPES` in onednn.py.
constexpr Tag kTags[] = {Tag::nchw, Tag::nhwc, Tag::nChw16c};
constexpr memory::data_type kTypes[] = {memory::data_type::f32, memory::data_type::bf16};

std::string last_error;

struct Sizes {
  std::int64_t n, c, s;
};

// The caller's tensors, in the plain layout; vectors in float32.
struct Tensors {
  void *x, *scale, *shift, *grad_y, *y, *grad_x, *grad_scale, *grad_shift;
};

struct Layer {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::batch_normalization_forward forward;
  dnnl::batch_normalization_backward backward;
  Arguments to_forward, to_backward;
  memory x, grad_y, y, grad_x;                          // as the primitives take them
  memory plain_x, plain_grad_y, plain_y, plain_grad_x;  // the caller's
  std::string implementation;
  std::int64_t workspace_bytes = 0;

  Layer(Sizes sizes, int dtype, int format, bool relu, float eps, const Tensors& at) {
    const memory::dims dims{sizes.n, sizes.c, sizes.s, 1};
    const bool blocked = kTags[format] == Tag::nChw16c;
    const memory::desc data(dims, kTypes[dtype], kTags[format]);
    const memory::desc plain(dims, kTypes[dtype], blocked ? Tag::nchw : kTags[format]);
    const memory::desc vector({sizes.c}, memory::data_type::f32, Tag::a);

    using dnnl::normalization_flags;
    auto flags = normalization_flags::use_scale | normalization_flags::use_shift;
    if (relu) flags |= normalization_flags::fuse_norm_relu;
    const dnnl::batch_normalization_forward::primitive_desc forward_kind(
        {dnnl::prop_kind::forward_training, data, eps, flags}, engine);
    const dnnl::batch_normalization_backward::primitive_desc backward_kind(
        {dnnl::prop_kind::backward, data, data, eps, flags}, engine, forward_kind);
    forward = dnnl::batch_normalization_forward(forward_kind);
    backward = dnnl::batch_normalization_backward(backward_kind);
    implementation = std::string(forward_kind.impl_info_str()) + ", " + backward_kind.impl_info_str();

    const auto wrap = [this](const memory::desc& kind, void* pointer) { return memory(kind, engine, pointer); };
    const auto inside = [&](const memory& given) { return blocked ? memory(data, engine) : given; };
    x = inside(plain_x = wrap(plain, at.x));
    y = inside(plain_y = wrap(plain, at.y));
    grad_y = inside(plain_grad_y = wrap(plain, at.grad_y));
    grad_x = inside(plain_grad_x = wrap(plain, at.grad_x));
    const memory scale = wrap(vector, at.scale), shift = wrap(vector, at.shift);
    const memory mean(forward_kind.mean_desc(), engine), variance(forward_kind.variance_desc(), engine);
    to_forward = {{DNNL_ARG_SRC, x},       {DNNL_ARG_DST, y},     {DNNL_ARG_SCALE, scale},
                  {DNNL_ARG_SHIFT, shift}, {DNNL_ARG_MEAN, mean}, {DNNL_ARG_VARIANCE, variance}};
    to_backward = {{DNNL_ARG_SRC, x},
                   {DNNL_ARG_DIFF_DST, grad_y},
                   {DNNL_ARG_DIFF_SRC, grad_x},
                   {DNNL_ARG_SCALE, scale},
                   {DNNL_ARG_SHIFT, shift},  // not read, but counted
                   {DNNL_ARG_MEAN, mean},
                   {DNNL_ARG_VARIANCE, variance},
                   {DNNL_ARG_DIFF_SCALE, wrap(vector, at.grad_scale)},
                   {DNNL_ARG_DIFF_SHIFT, wrap(vector, at.grad_shift)}};
    workspace_bytes = static_cast<std::int64_t>(forward_kind.workspace_desc().get_size());
    if (workspace_bytes) {
      const memory workspace(forward_kind.workspace_desc(), engine);
      to_forward.insert({DNNL_ARG_WORKSPACE, workspace});
      to_backward.insert({DNNL_ARG_WORKSPACE, workspace});
    }
  }

  void move(memory& from, memory& to) {
    if (from.get_data_handle() == to.get_data_handle()) return;
    dnnl::reorder(from, to).execute(stream, from, to);
    stream.wait();
  }
};

// No exception may leave through C: 0 means that it went well, anything else that `onednn_error` knows more.
template <class Work>
int guarded(Work work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {

const char* onednn_error() { return last_error.c_str(); }

// The library that runs, which need not be the one whose header was compiled.
void onednn_version(int* numbers) {
  const dnnl_version_t* version = dnnl_version();
  numbers[0] = version->major, numbers[1] = version->minor, numbers[2] = version->patch;
}

// How many threads oneDNN would take for a call from this thread.
int onednn_threads() { return omp_get_max_threads(); }

void* onednn_new(std::int64_t n, std::int64_t c, std::int64_t s, int dtype, int format, int relu, float eps,
                 const Tensors* tensors) {
  Layer* layer = nullptr;
  guarded([&] { layer = new Layer({n, c, s}, dtype, format, relu != 0, eps, *tensors); });
  return layer;
}

void onednn_free(void* layer) { delete static_cast<Layer*>(layer); }

const char* onednn_implementation(void* layer) { return static_cast<Layer*>(layer)->implementation.c_str(); }

std::int64_t onednn_workspace_bytes(void* layer) { return static_cast<Layer*>(layer)->workspace_bytes; }

int onednn_load(void* handle) {
  return guarded([&] {
    Layer& layer = *static_cast<Layer*>(handle);
    layer.move(layer.plain_x, layer.x);
    layer.move(layer.plain_grad_y, layer.grad_y);
  });
}

int onednn_store(void* handle) {
  return guarded([&] {
    Layer& layer = *static_cast<Layer*>(handle);
    layer.move(layer.y, layer.plain_y);
    layer.move(layer.grad_x, layer.plain_grad_x);
  });
}

int onednn_forward(void* handle) {
  return guarded([&] {
    Layer& layer = *static_cast<Layer*>(handle);
    layer.forward.execute(layer.stream, layer.to_forward);
    layer.stream.wait();
  });
}

int onednn_backward(void* handle) {
  return guarded([&] {
    Layer& layer = *static_cast<Layer*>(handle);
    layer.backward.execute(layer.stream, layer.to_backward);
    layer.stream.wait();
  });
}
}
