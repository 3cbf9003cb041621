/* A device made of host memory: the few CANN calls whose answers torch_npu reads. Every other symbol is a stub that
 * returns 0 (success), written by build.py. Two devices, "Ascend910_9362" (Atlas A3), CANN "8.5.0"; each thread
 * has its own current device; streams and events are numbers, copies are done when the call returns. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int Error;
enum { OK = 0, NOT_SUPPORTED = 207000, NO_CONTEXT = 107002, NO_MEMORY = 207001 };

static __thread int device = -1;      /* this thread never called aclrtSetDevice */
static unsigned opened = 0;           /* a bit for each device on which somebody opened a context */
static Error open_context(int id) { device = id; __atomic_fetch_or(&opened, 1u << id, __ATOMIC_RELAXED); return OK; }
unsigned emulation_opened(int forget) { unsigned found = opened; if (forget) opened = 0; return found; }
static uintptr_t handles = 1000;
static Error new_handle(void **out) { *out = (void *)handles++; return OK; }
static Error answer(uint32_t *out, uint32_t value) { *out = value; return OK; }

/* device and context */
Error aclrtGetDeviceCount(uint32_t *count) { return answer(count, 2); }
Error aclrtSetDevice(int id) { return open_context(id); }
Error aclrtGetDevice(int *id) { *id = device; return device < 0 ? NO_CONTEXT : OK; }
Error rtGetDevice(int *id) { *id = device < 0 ? 0 : device; return OK; }
Error aclrtGetLogicDevIdByUserDevId(int user, int *logic) { *logic = user; return OK; }
Error aclrtGetUserDevIdByLogicDevId(int logic, int *user) { *user = logic; return OK; }
Error aclrtGetPhyDevIdByLogicDevId(int logic, int *physical) { *physical = logic; return OK; }
Error aclrtGetPrimaryCtxState(int id, uint32_t *flags, int *active) { *flags = 0; *active = device >= 0; return OK; }
Error aclrtCreateContext(void **context, int id) { open_context(id); return new_handle(context); }
Error aclrtGetCurrentContext(void **context) { *context = (void *)1; return OK; }
Error aclrtQueryDeviceStatus(int id, int *status) { *status = 0; return OK; }
Error aclrtDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return OK; }
const char *aclrtGetSocName(void) { return "Ascend910_9362"; }
const char *aclGetRecentErrMsg(void) { return ""; }
Error aclrtGetRunMode(int *mode) { *mode = 1; return OK; }                       /* host and device are apart */
Error aclrtGetVersion(int *a, int *b, int *c) { *a = 1; *b = 14; *c = 0; return OK; }
Error aclsysGetCANNVersion(int package, char *version) { memset(version, 0, 512); strcpy(version, "8.5.0"); return OK; }
Error aclsysGetVersionStr(const char *package, char *version) { strcpy(version, "8.5.0"); return OK; }
Error aclrtCheckArchCompatibility(const char *soc, int *can) { *can = 1; return OK; }
Error aclrtGetDeviceInfo(uint32_t id, int what, int64_t *value) { *value = 24; return OK; }      /* 24 AI cores */
Error aclGetDeviceCapability(uint32_t id, int what, int64_t *value) { *value = 24; return OK; }
Error aclrtGetResInCurrentThread(int what, uint32_t *value) { return answer(value, 24); }
Error aclrtGetDeviceResLimit(int id, int what, uint32_t *value) { return answer(value, 24); }
Error aclrtGetStreamResLimit(void *stream, int what, uint32_t *value) { return answer(value, 24); }
Error aclGetCannAttribute(int what, int *value) { *value = 0; return OK; }
size_t aclGetCompileoptSize(int option) { return 256; }
Error aclGetCompileopt(int option, char *value, size_t size) { memset(value, 0, size); strcpy(value, "0"); return OK; }
Error aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
Error aclrtCtxGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }

/* memory: the device's is the host's */
Error aclrtMalloc(void **p, size_t size, int policy) { return (*p = aligned_alloc(512, (size + 1023) / 512 * 512)) ? OK : NO_MEMORY; }
Error aclrtMallocAlign32(void **p, size_t size, int policy) { return aclrtMalloc(p, size, 0); }
Error aclrtMallocWithCfg(void **p, size_t size, int policy, void *config) { return aclrtMalloc(p, size, 0); }
Error aclrtMallocHost(void **p, size_t size) { return aclrtMalloc(p, size, 0); }
Error aclrtMallocHostWithCfg(void **p, uint64_t size, void *config) { return aclrtMalloc(p, size, 0); }
Error aclrtFree(void *p) { free(p); return OK; }
Error aclrtFreeHost(void *p) { free(p); return OK; }
Error aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { memmove(to, from, size); return OK; }
Error aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) { return aclrtMemcpy(to, room, from, size, kind); }
Error aclrtMemset(void *to, size_t room, int value, size_t size) { memset(to, value, size); return OK; }
Error aclrtMemsetAsync(void *to, size_t room, int value, size_t size, void *stream) { return aclrtMemset(to, room, value, size); }
Error aclrtGetMemInfo(int what, size_t *free_bytes, size_t *total) { *free_bytes = *total = 60ul << 30; return OK; }
Error aclrtMemGetAllocationGranularity(void *property, int option, size_t *size) { *size = 2 << 20; return OK; }
Error aclrtReserveMemAddress(void) { return NOT_SUPPORTED; }                     /* no expandable segments */
Error aclrtPointerGetAttributes(void *p, void *attributes) { return 1; }         /* torch_npu keeps its own list of pinned memory */
Error aclrtHostRegister(void *p, uint64_t size, int kind, void **device_pointer) { *device_pointer = p; return OK; }

/* streams, events, host callbacks: everything is done at once */
Error aclrtCreateStream(void **stream) { return new_handle(stream); }
Error aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return new_handle(stream); }
Error aclrtCtxGetCurrentDefaultStream(void **stream) { *stream = (void *)7; return OK; }
Error aclrtDeviceGetStreamPriorityRange(int *low, int *high) { *low = *high = 0; return OK; }
Error aclrtGetStreamId(void *stream, int *id) { *id = 1; return OK; }
Error aclrtStreamQuery(void *stream, int *status) { *status = 1; return OK; }
Error aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) { return answer(flag, 0); }
Error aclrtGetDeviceSatMode(int *mode) { *mode = 1; return OK; }
Error aclmdlRICaptureGetInfo(void *stream, int *status, void **model) { *status = 0; *model = 0; return OK; }
Error aclmdlRICaptureThreadExchangeMode(int *mode) { return OK; }
Error aclrtCreateEvent(void **event) { return new_handle(event); }
Error aclrtCreateEventWithFlag(void **event, uint32_t flag) { return new_handle(event); }
Error aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return new_handle(event); }
Error aclrtQueryEventStatus(void *event, int *status) { *status = 1; return OK; }
Error aclrtQueryEventWaitStatus(void *event, int *status) { *status = 1; return OK; }
Error aclrtEventElapsedTime(float *milliseconds, void *a, void *b) { *milliseconds = 0; return OK; }
Error aclrtLaunchCallback(void (*f)(void *), void *data, int mode, void *stream) { f(data); return OK; }
Error aclrtLaunchHostFunc(void *stream, void (*f)(void *), void *data) { f(data); return OK; }

/* looked up by name while the program runs, so that build.py cannot see them; nothing to do for them */
Error aclrtSetDeviceSatMode(void) { return OK; }
Error aclrtSetOpExecuteTimeOut(void) { return OK; }
Error aclrtSetStreamOverflowSwitch(void) { return OK; }
Error aclrtSynchronizeDeviceWithTimeout(void) { return OK; }
Error aclSetCompileopt(void) { return OK; }
Error aclrtDestroyStreamForce(void) { return OK; }
Error aclrtCtxSetSysParamOpt(void) { return OK; }
Error aclrtSetSysParamOpt(void) { return OK; }
Error aclrtSynchronizeStreamWithTimeout(void) { return OK; }
