// Marks functions that the kernels and host code share, in headers that a host compiler reads too.
#pragma once

#ifdef __CUDACC__
#define SLIDEJAX_HOST_DEVICE __host__ __device__
#else
#define SLIDEJAX_HOST_DEVICE
#endif
