// Launches the kernels of plan.h on the GPU. No torch headers; cuda_op.cpp binds it to the ops.
#include <cuda_runtime.h>

#include <limits>

#include "../cayley.h"
#include "plan.h"

namespace vkd::cayley {
namespace {

struct DeviceTeam {
  __device__ __forceinline__ int tid() const { return int(threadIdx.x); }
  __device__ __forceinline__ void sync() { __syncthreads(); }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::S::THREADS, Kernel::RESIDENT / Kernel::S::THREADS) run(const Kernel kernel) {
  __shared__ double smem[Kernel::SMEM];
  DeviceTeam team;
  kernel(team, smem, blockIdx.x);
}

struct Launcher {
  cudaStream_t stream;
  cudaError_t status = cudaSuccess;

  template <class Kernel>
  void operator()(const Kernel& kernel, int64_t blocks) {
    if (status != cudaSuccess) return;
    // The batch is folded into x: y and z end at 65535.
    if (blocks > std::numeric_limits<int>::max()) {
      status = cudaErrorInvalidConfiguration;
      return;
    }
    run<Kernel><<<unsigned(blocks), Kernel::S::THREADS, 0, stream>>>(kernel);
    status = cudaGetLastError();
  }
};

template <class T>
Strided<const T> strided(const MatrixBatch& x) {
  return {static_cast<const T*>(x.data), x.batch, x.row, x.col};
}

}  // namespace

int64_t forward_workspace_cuda(int64_t batch, int t, int s) { return forward_workspace(batch, t, s); }
int64_t backward_workspace_cuda(int64_t batch, int t, int s) { return backward_workspace(batch, t, s); }

template <class T>
cudaError_t forward_cuda(MatrixBatch weight, T* q, double* r, double* workspace, int64_t batch, int t, int s,
                         cudaStream_t stream) {
  Launcher launch{stream};
  forward<DeviceShape>(launch, Forward<T>{strided<T>(weight), q, r, nullptr, nullptr, t, s, 0}, workspace, batch);
  return launch.status;
}

template <class T>
cudaError_t backward_cuda(MatrixBatch grad_q, MatrixBatch weight, const double* r, T* grad_weight, double* workspace,
                          int64_t batch, int t, int s, cudaStream_t stream) {
  Launcher launch{stream};
  backward<DeviceShape>(
      launch, Backward<T>{strided<T>(grad_q), strided<T>(weight), r, grad_weight, nullptr, nullptr, nullptr, t, s, 0},
      workspace, batch);
  return launch.status;
}

#define VKD_INSTANTIATE(T)                                                                                       \
  template cudaError_t forward_cuda<T>(MatrixBatch, T*, double*, double*, int64_t, int, int, cudaStream_t);      \
  template cudaError_t backward_cuda<T>(MatrixBatch, MatrixBatch, const double*, T*, double*, int64_t, int, int, \
                                        cudaStream_t);
VKD_INSTANTIATE(float)
VKD_INSTANTIATE(double)

}  // namespace vkd::cayley
