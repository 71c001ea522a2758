/*
A CUDA driver without a GPU: memory is address space, kernels do nothing.

Preloaded, it answers for libcuda, libcudart, NVML and cuBLAS, so that torch, its allocator, its compiler
and Triton run as they do on the card that GPU_NAME, GPU_CC and GPU_BYTES name. It counts memory and
refuses what the card would refuse: more memory than it has, a kernel with too much shared memory or
for another architecture, a wait while a CUDA graph is captured. What isn't here isn't called, or
fails as on a machine without a driver.

Sources: CUDA's headers, and the functions that torch 2.13 and Triton 3.7 import.
*/
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <driver_types.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Contents are copied up to this size: numbers and indices, but no weights. */
#define COPIED_BYTES (1 << 20)
#define PAGE 4096

/* What Python reads. `waits`: times that the CPU waited for the GPU; `kernels`: those of Triton.
   A context takes half a GiB (assumed, as in training/memory.py). */
struct {
  unsigned long launches, waits, kernels, shared_bytes, used, most_used;
} fake_cuda = {.used = 512 << 20};

static int capturing; /* a CUDA graph, on this stream */
static void *captured_stream;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static unsigned long setting(const char *name) {
  const char *text = getenv(name);
  if (!text) {
    fprintf(stderr, "%s is not set\n", name);
    exit(2);
  }
  return strtoul(text, NULL, 10);
}
static int capability(void) { return setting("GPU_CC"); }

/* Shared memory of a block, with its consent; CUDA C++ Programming Guide, compute capabilities. */
static int shared_per_block(void) { return capability() == 80 ? 163 << 10 : 99 << 10; }

/* A function with this C name and any arguments: one that succeeds, or also makes a handle. */
#define SUCCEEDS(name)                                                                             \
  int stub_##name(void) __asm__(#name);                                                            \
  int stub_##name(void) { return 0; }
#define MAKES(name)                                                                                \
  int stub_##name(void **out) __asm__(#name);                                                      \
  int stub_##name(void **out) { return make_handle(out); }

static int make_handle(void **out) {
  static unsigned long made; /* no address: nobody looks behind a handle */
  *out = (void *)(PAGE * __sync_add_and_fetch(&made, 1));
  return 0;
}

static int wait_for_gpu(void) {
  fake_cuda.waits++;
  return capturing ? cudaErrorStreamCaptureUnsupported : 0;
}

/* --- the device */

static int attribute(int *value, int name) {
  switch (name) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    return *value = capability() / 10, 0;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    return *value = capability() % 10, 0;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    return *value = capability() == 80 ? 108 : 82, 0;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    return *value = 32, 0;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
    return *value = 1024, 0;
  case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
    return *value = 64, 0;
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
    return *value = 0x7fffffff, 0;
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
    return *value = 65535, 0;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
    return *value = capability() == 80 ? 2048 : 1536, 0;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
    return *value = 65536, 0;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
    return *value = 48 << 10, 0;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    return *value = shared_per_block(), 0;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    return *value = shared_per_block() + 1024, 0;
  case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
    return *value = (capability() == 80 ? 40 : 6) << 20, 0;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: /* kHz */
    return *value = 1400000, 0;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    return *value = 9000000, 0;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: /* bits */
    return *value = 384, 0;
  case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
  case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
  case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    return *value = 1, 0;
  default:
    return *value = 0, 0;
  }
}
int cudaDeviceGetAttribute(int *value, int name, int device) { return attribute(value, name); }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice device) {
  return attribute(value, name);
}

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", getenv("GPU_NAME"));
  p->totalGlobalMem = setting("GPU_BYTES");
  attribute(&p->major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  attribute(&p->minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  attribute(&p->multiProcessorCount, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  attribute(&p->maxThreadsPerMultiProcessor, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR);
  attribute(&p->l2CacheSize, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
  attribute(&p->memoryBusWidth, CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
  p->warpSize = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = shared_per_block();
  p->sharedMemPerMultiprocessor = shared_per_block() + 1024;
  p->textureAlignment = p->surfaceAlignment = 512;
  p->unifiedAddressing = p->cooperativeLaunch = p->maxBlocksPerMultiProcessor = 1;
  return 0;
}

static int set_int(int *out, int value) { return *out = value, 0; }
int cudaGetDeviceCount(int *out) { return set_int(out, 1); }
int cudaGetDevice(int *out) { return set_int(out, 0); }
int cudaDriverGetVersion(int *out) { return set_int(out, 13000); }
int cudaRuntimeGetVersion(int *out) { return set_int(out, 13000); }
int cudaDeviceCanAccessPeer(int *out, int a, int b) { return set_int(out, 0); }
int cudaDeviceGetStreamPriorityRange(int *least, int *most) {
  return set_int(least, 0) + set_int(most, -5);
}
CUresult cuDeviceGet(CUdevice *out, int ordinal) { return set_int(out, 0); }
CUresult cuCtxGetDevice(CUdevice *out) { return set_int(out, 0); }
CUresult cuDriverGetVersion(int *out) { return set_int(out, 13000); }
CUresult cuDeviceGetCount(int *out) { return set_int(out, 1); }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0;
  return set_int(active, 1);
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device) {
  return make_handle((void **)out);
}
CUresult cuCtxGetLimit(size_t *out, CUlimit limit) { return *out = 1 << 20, 0; }
CUresult cuGetErrorString(CUresult error, const char **out) {
  *out = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "refused by bench/cuda_fake";
  return 0;
}
int cudaDeviceGetPCIBusId(char *out, int size, int device) {
  snprintf(out, size, "0000:01:00.0");
  return 0;
}
SUCCEEDS(cudaSetDevice)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
MAKES(cuCtxGetCurrent)

/* torch asks for newer functions than it calls. */
static int not_supported(void) { return CUDA_ERROR_NOT_SUPPORTED; }
int cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version,
                                     unsigned long long flags, int *status) {
  void *found = dlsym(RTLD_DEFAULT, name);
  *out = found ? found : (void *)not_supported;
  return set_int(status, cudaDriverEntryPointSuccess);
}

/* --- memory */

static int take(size_t size) {
  pthread_mutex_lock(&lock);
  int fits = fake_cuda.used + size <= setting("GPU_BYTES");
  if (fits)
    fake_cuda.used += size;
  if (fake_cuda.used > fake_cuda.most_used)
    fake_cuda.most_used = fake_cuda.used;
  pthread_mutex_unlock(&lock);
  return fits;
}
static void give_back(size_t size) {
  pthread_mutex_lock(&lock);
  fake_cuda.used -= size;
  pthread_mutex_unlock(&lock);
}
static char *reserve(size_t size, int access) {
  void *address = mmap(NULL, size, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) {
    perror("bench/cuda_fake: no address space");
    exit(2);
  }
  return address;
}

/* The page before an allocation holds its size. */
int cudaMalloc(void **out, size_t size) {
  if (!take(size))
    return cudaErrorMemoryAllocation;
  char *page = reserve(size + PAGE, PROT_READ | PROT_WRITE);
  *(size_t *)page = size;
  *out = page + PAGE;
  return 0;
}
int cudaFree(void *address) {
  if (!address)
    return 0;
  wait_for_gpu();
  char *page = (char *)address - PAGE;
  size_t size = *(size_t *)page;
  give_back(size);
  return munmap(page, size + PAGE) ? cudaErrorInvalidValue : 0;
}
int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *total = setting("GPU_BYTES");
  *free_bytes = *total - fake_cuda.used;
  return 0;
}
int cudaHostAlloc(void **out, size_t size, unsigned flags) {
  return posix_memalign(out, PAGE, size) ? cudaErrorMemoryAllocation : 0;
}
int cudaFreeHost(void *address) {
  free(address);
  return 0;
}
int cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *address) {
  memset(out, 0, sizeof *out);
  return 0;
}
SUCCEEDS(cudaHostRegister)
SUCCEEDS(cudaHostUnregister)
SUCCEEDS(cudaMemcpyToSymbol)
int cudaGetSymbolAddress(void **out, const void *symbol) {
  static char memory[PAGE];
  return *out = memory, 0;
}

/* Nothing is computed, so a float that the CPU reads (a loss, a norm) would be what was left in its
   memory, perhaps NaN. It is 0. Counts are of 8 bytes. */
static int copy(void *to, const void *from, size_t size, int kind) {
  if (kind == cudaMemcpyDeviceToHost && size <= sizeof(float))
    memset(to, 0, size);
  else if (size <= COPIED_BYTES)
    memmove(to, from, size);
  return 0;
}
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  int refused = wait_for_gpu();
  return refused ? refused : copy(to, from, size, kind);
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  return copy(to, from, size, kind);
}
int cudaMemset(void *to, int value, size_t size) {
  if (size <= COPIED_BYTES)
    memset(to, value, size);
  return 0;
}
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) {
  return cudaMemset(to, value, size);
}

/* Expandable segments: addresses first, memory later. */
CUresult cuMemGetAllocationGranularity(size_t *out, const CUmemAllocationProp *properties,
                                       CUmemAllocationGranularity_flags option) {
  return *out = 2 << 20, 0;
}
CUresult cuMemAddressReserve(CUdeviceptr *out, size_t size, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
  *out = (CUdeviceptr)reserve(size, PROT_NONE);
  return 0;
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  return munmap((void *)address, size) ? CUDA_ERROR_INVALID_VALUE : 0;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *out, size_t size,
                     const CUmemAllocationProp *properties, unsigned long long flags) {
  if (!take(size))
    return CUDA_ERROR_OUT_OF_MEMORY;
  *out = size; /* the size is handle enough */
  return 0;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle size) {
  give_back(size);
  return 0;
}
CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  return mprotect((void *)address, size, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : 0;
}
CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  wait_for_gpu();
  madvise((void *)address, size, MADV_DONTNEED);
  return mprotect((void *)address, size, PROT_NONE) ? CUDA_ERROR_INVALID_VALUE : 0;
}
SUCCEEDS(cuMemSetAccess)

/* NVML, which torch asks first if GPUs of several hosts share memory, and whose memory is full. */
SUCCEEDS(nvmlInit_v2)
SUCCEEDS(nvmlDeviceGetNvLinkRemoteDeviceType)
SUCCEEDS(nvmlDeviceGetNvLinkRemotePciInfo_v2)
SUCCEEDS(nvmlSystemGetCudaDriverVersion_v2)
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **out) { return make_handle(out); }
int nvmlDeviceGetGpuFabricInfoV(void *device, unsigned *info) {
  memset(info + 1, 0, 28); /* behind the version: a GPU without a fabric */
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *info) {
  return *count = 0;
}

/* --- streams, events, graphs */

int cudaDeviceSynchronize(void) { return wait_for_gpu(); }
int cudaStreamSynchronize(void *stream) {
  int refused = wait_for_gpu();
  return stream == captured_stream ? refused : 0; /* torch waits on others */
}
int cudaEventSynchronize(void *event) { return wait_for_gpu(); }
int cudaEventElapsedTime(float *out, void *from, void *to) { return *out = 1, 0; }
int cudaStreamGetPriority(void *stream, int *out) { return set_int(out, 0); }
MAKES(cudaStreamCreate)
MAKES(cudaStreamCreateWithFlags)
MAKES(cudaStreamCreateWithPriority)
MAKES(cudaEventCreate)
MAKES(cudaEventCreateWithFlags)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaEventRecord)
SUCCEEDS(cudaEventRecordWithFlags)

static int is_captured(void *stream) { return capturing && stream == captured_stream; }
int cudaStreamBeginCapture(void *stream, int mode) {
  captured_stream = stream;
  return capturing = 1, 0;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  capturing = 0;
  return make_handle(graph);
}
int cudaStreamIsCapturing(void *stream, int *status) {
  return set_int(status, is_captured(stream));
}
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph,
                             const void **nodes, const void **edges, size_t *count) {
  if (id)
    *id = is_captured(stream);
  if (graph)
    *graph = NULL;
  if (nodes)
    *nodes = NULL;
  if (edges)
    *edges = NULL;
  if (count)
    *count = 0;
  return set_int(status, is_captured(stream));
}
int cudaGraphGetNodes(void *graph, void **nodes, size_t *count) { return *count = 1, 0; }
MAKES(cudaGraphInstantiateWithFlags)
SUCCEEDS(cudaGraphLaunch)
SUCCEEDS(cudaGraphDestroy)
SUCCEEDS(cudaGraphExecDestroy)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)

/* --- kernels */

static int launch(size_t shared) {
  fake_cuda.launches++;
  if (shared > fake_cuda.shared_bytes)
    fake_cuda.shared_bytes = shared;
  return shared > shared_per_block() ? CUDA_ERROR_INVALID_VALUE : 0;
}
int cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **args,
                     size_t shared, void *stream) {
  return launch(shared);
}
int __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **args,
                       size_t shared, void *stream) {
  return launch(shared);
}
int cudaLaunchKernelExC(const struct cudaLaunchConfig_st *config, const void *kernel, void **args) {
  return launch(config->dynamicSmemBytes);
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, CUstream stream, void **args,
                        void **extra) {
  return launch(shared);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **args, void **extra) {
  return launch(config->sharedMemBytes);
}

/* The architecture of a cubin is in its ELF flags. */
static int load(CUmodule *out, const void *image) {
  const unsigned char *elf = image;
  int for_nvidia = !memcmp(elf, "\177ELF", 4) && elf[18] == 190;
  unsigned flags;
  memcpy(&flags, elf + 48, sizeof flags);
  int abi = elf[8];
  int architecture = (abi >= 8 ? flags >> 8 : flags) & 255;
  if (!for_nvidia || architecture != capability())
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  return make_handle((void **)out);
}
CUresult cuModuleLoadData(CUmodule *out, const void *image) { return load(out, image); }
CUresult cuModuleLoad(CUmodule *out, const char *path) {
  FILE *file = fopen(path, "rb");
  unsigned char header[64] = {0};
  size_t count = file ? fread(header, 1, sizeof header, file) : 0;
  if (file)
    fclose(file);
  return count < sizeof header ? CUDA_ERROR_FILE_NOT_FOUND : load(out, header);
}
CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
  fake_cuda.kernels++;
  return make_handle((void **)out);
}
CUresult cuFuncGetAttribute(int *out, CUfunction_attribute name, CUfunction f) {
  int is_threads = name == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
  return set_int(out, is_threads ? 1024 : name == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0);
}
int cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *kernel) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 32;
  out->ptxVersion = out->binaryVersion = capability();
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out, const void *kernel,
                                                           int threads, size_t shared,
                                                           unsigned flags) {
  return set_int(out, 2);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *out, CUfunction f, int threads,
                                                     size_t shared) {
  return set_int(out, 2);
}
MAKES(__cudaGetKernel)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuModuleUnload)
/* named by torch, called by nothing of ours */
SUCCEEDS(cuLaunchCooperativeKernel)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuModuleLoadDataEx)
SUCCEEDS(cuPointerGetAttribute)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuOccupancyMaxActiveClusters)

/* --- matrix products */

#define MULTIPLIES(name)                                                                           \
  int stub_##name(void) __asm__(#name);                                                            \
  int stub_##name(void) { return launch(0); }
MULTIPLIES(cublasGemmEx)
MULTIPLIES(cublasSgemm_v2)
MULTIPLIES(cublasSgemmEx)
MULTIPLIES(cublasGemmStridedBatchedEx)
MULTIPLIES(cublasSgemmStridedBatched)
MULTIPLIES(cublasLtMatmul)
MAKES(cublasCreate_v2)
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
int cublasGetMathMode(void *handle, int *out) { return set_int(out, 0); }
int cublasGetPointerMode_v2(void *handle, int *out) { return set_int(out, 0); }
MAKES(cublasLtMatmulDescCreate)
MAKES(cublasLtMatmulPreferenceCreate)
MAKES(cublasLtMatrixLayoutCreate)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
/* Its result says "no workspace" where it is zero. */
struct heuristic {
  unsigned long algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
int cublasLtMatmulAlgoGetHeuristic(void *lt, void *op, void *a, void *b, void *c, void *d,
                                   void *preference, int asked, struct heuristic *out,
                                   int *found) {
  memset(out, 0, sizeof *out);
  return set_int(found, 1);
}
