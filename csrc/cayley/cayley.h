// The CUDA Cayley launchers, as cuda_op.cpp sees them; cuda/kernels.cu defines them, without torch headers.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace vkd::cayley {

// A batch of matrices on the device; strides in elements.
struct MatrixBatch {
  const void* data;
  int64_t batch, row, col;
};

// Doubles of workspace that a call of cayley_forward_cuda / cayley_backward_cuda needs.
int64_t forward_workspace_cuda(int64_t batch, int t, int s);
int64_t backward_workspace_cuda(int64_t batch, int t, int s);

// Q and R = M^-1 of weight (batch, t, s), t >= s >= 1, batch >= 1. T is float or double. q (batch, t, s) and
// r (batch, s, s) are contiguous. Enqueues on `stream` of the current device and returns the first launch error.
template <class T>
cudaError_t forward_cuda(MatrixBatch weight, T* q, double* r, double* workspace, int64_t batch, int t, int s,
                         cudaStream_t stream);

// grad_weight (batch, t, s), contiguous, from grad_q and weight (batch, t, s) and the r of the forward.
template <class T>
cudaError_t backward_cuda(MatrixBatch grad_q, MatrixBatch weight, const double* r, T* grad_weight, double* workspace,
                          int64_t batch, int t, int s, cudaStream_t stream);

}  // namespace vkd::cayley
