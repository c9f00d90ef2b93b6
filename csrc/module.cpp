// The extension module vkd_kernels._C: the operators' schemas (implementations register themselves in
// cayley/cpu/cayley.cpp and, in CUDA builds, cayley/cuda_op.cpp) and the facts of the build.
#include <pybind11/pybind11.h>
#include <torch/library.h>

TORCH_LIBRARY(vkd_kernels, m) {
  // weight (..., T, S), T >= S, float32 or float64 -> q like weight, r = M^-1 (..., S, S) in float64
  m.def("cayley_forward(Tensor weight) -> (Tensor q, Tensor r)");
  m.def("cayley_backward(Tensor grad_q, Tensor weight, Tensor r) -> Tensor");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of vkd_kernels; importing it registers torch.ops.vkd_kernels.*";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = VKD_TORCH_VERSION;
        info["compiler"] = VKD_COMPILER;
#ifdef VKD_CUDA_VERSION
        info["cuda"] = VKD_CUDA_VERSION;
        info["cuda_architectures"] = VKD_CUDA_ARCHITECTURES;
#else
        info["cuda"] = pybind11::none();
        info["cuda_architectures"] = pybind11::none();
#endif
        return info;
      },
      "Compiler, PyTorch and CUDA versions and the GPU architectures that this extension was built with");
}
