// What the core uses of ONNX Runtime's C interface, so that it builds without ONNX Runtime.
//
// That interface is a table of functions which only ever grows at its end, and a table of ours for
// each custom operator. Both are written here from their public documentation, with gaps for what
// is not used; the numbers are the places in the table.

#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ORT_CALL __stdcall
#else
#define ORT_CALL
#endif

namespace ort {

struct Status;  // null for success
struct SessionOptions;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TypeAndShape;
struct Domain;

// The first version with all that is below.
constexpr uint32_t kVersion = 19;

enum Code : int { kFail = 1, kInvalidArgument = 2 };
enum Element : int {
  kAny = 0,
  kFloat = 1,
  kInt64 = 7,
  kHalf = 10,
  kDouble = 11,
  kBrainFloat = 16,
};
enum Presence : int { kRequired = 0, kOptional = 1 };

struct CustomOp;

struct Api {
  Status*(ORT_CALL* create_status)(int code, const char* message);  // 0
  void* until_26[25];
  Status*(ORT_CALL* create_custom_op_domain)(const char* name, Domain**);
  Status*(ORT_CALL* custom_op_domain_add)(Domain*, const CustomOp*);
  Status*(ORT_CALL* add_custom_op_domain)(SessionOptions*, Domain*);
  void* until_51[22];
  Status*(ORT_CALL* get_tensor_mutable_data)(Value*, void**);  // 51
  void* until_60[8];
  Status*(ORT_CALL* get_tensor_element_type)(const TypeAndShape*, int*);  // 60
  Status*(ORT_CALL* get_dimensions_count)(const TypeAndShape*, size_t*);
  Status*(ORT_CALL* get_dimensions)(const TypeAndShape*, int64_t*, size_t count);
  void* until_65[2];
  Status*(ORT_CALL* get_tensor_type_and_shape)(const Value*, TypeAndShape**);  // 65
  void* until_86[20];
  Status*(ORT_CALL* get_attribute_int64)(const KernelInfo*, const char* name, int64_t*);  // 86
  void* until_88[1];
  Status*(ORT_CALL* get_input_count)(const KernelContext*, size_t*);  // 88
  void* until_90[1];
  Status*(ORT_CALL* get_input)(const KernelContext*, size_t index, const Value**);  // 90
  Status*(ORT_CALL* get_output)(KernelContext*, size_t index, const int64_t* sizes, size_t count,
                                Value**);
  void* until_93[1];
  void(ORT_CALL* release_status)(Status*);  // 93
  void* until_99[5];
  void(ORT_CALL* release_type_and_shape)(TypeAndShape*);  // 99
  void* until_163[63];
  Status*(ORT_CALL* get_attribute_int64s)(const KernelInfo*, const char* name, int64_t*,
                                          size_t* count);  // 163
  void* until_237[73];
  Status*(ORT_CALL* has_config_entry)(const SessionOptions*, const char* key, int*);  // 237
  Status*(ORT_CALL* get_config_entry)(const SessionOptions*, const char* key, char*, size_t*);
};

constexpr size_t place(size_t offset) { return offset / sizeof(void*); }
static_assert(place(offsetof(Api, create_custom_op_domain)) == 26, "");
static_assert(place(offsetof(Api, get_tensor_mutable_data)) == 51, "");
static_assert(place(offsetof(Api, get_tensor_element_type)) == 60, "");
static_assert(place(offsetof(Api, get_tensor_type_and_shape)) == 65, "");
static_assert(place(offsetof(Api, get_attribute_int64)) == 86, "");
static_assert(place(offsetof(Api, get_input_count)) == 88, "");
static_assert(place(offsetof(Api, get_input)) == 90, "");
static_assert(place(offsetof(Api, release_status)) == 93, "");
static_assert(place(offsetof(Api, release_type_and_shape)) == 99, "");
static_assert(place(offsetof(Api, get_attribute_int64s)) == 163, "");
static_assert(place(offsetof(Api, has_config_entry)) == 237, "");

struct ApiBase {
  const Api*(ORT_CALL* get_api)(uint32_t version);  // null where it is older
  const char*(ORT_CALL* get_version)();
};

// Filled in by us; null where there is nothing to say.
struct CustomOp {
  uint32_t version;
  void* create_kernel_v1;
  const char*(ORT_CALL* name)(const CustomOp*);
  const char*(ORT_CALL* provider)(const CustomOp*);
  Element(ORT_CALL* input_type)(const CustomOp*, size_t index);
  size_t(ORT_CALL* input_count)(const CustomOp*);
  Element(ORT_CALL* output_type)(const CustomOp*, size_t index);
  size_t(ORT_CALL* output_count)(const CustomOp*);
  void* compute_v1;
  void(ORT_CALL* destroy)(void* kernel);
  Presence(ORT_CALL* input_presence)(const CustomOp*, size_t index);
  Presence(ORT_CALL* output_presence)(const CustomOp*, size_t index);
  int(ORT_CALL* input_memory)(const CustomOp*, size_t index);
  int(ORT_CALL* zeros[4])(const CustomOp*);  // of variadic inputs and outputs
  Status*(ORT_CALL* create_kernel)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status*(ORT_CALL* compute)(void* kernel, KernelContext*);
  void* infer_shapes;
  int(ORT_CALL* first_version)(const CustomOp*);
  int(ORT_CALL* last_version)(const CustomOp*);
  void* aliases[4];
};

}  // namespace ort
