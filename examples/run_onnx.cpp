// Run an ONNX file on deformnd's kernels: ONNX Runtime and one library, no Python.
//
//   g++ -std=c++17 run_onnx.cpp -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime -o run_onnx
//   ./run_onnx model.onnx /path/to/_core.so
//
// ONNXRUNTIME is the folder of ONNX Runtime's own release, 1.19 or newer; the library is the file
// that deformnd.onnx.custom_ops_library() names, and may have been copied. All inputs are float32,
// and are filled with 0.5; a size that the file leaves open is 1.

#include <onnxruntime_cxx_api.h>

#include <cstdio>
#include <string>
#include <vector>

// A path as ONNX Runtime takes it, which on Windows is of wide characters.
std::basic_string<ORTCHAR_T> wide(const std::string& path) { return {path.begin(), path.end()}; }

int main(int count, char** words) {
  if (count != 3) return std::fprintf(stderr, "usage: %s model.onnx library\n", words[0]), 2;
  try {
    Ort::Env env;
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(2);
    // ONNX Runtime's threads shall not spin while the library's, which are OpenMP's, compute.
    options.AddConfigEntry("session.intra_op.allow_spinning", "0");
    options.AddConfigEntry("deformnd.threads", "2");  // before the library
    options.RegisterCustomOpsLibrary(wide(words[2]).c_str());
    Ort::Session session(env, wide(words[1]).c_str(), options);

    Ort::AllocatorWithDefaultOptions allocator;
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<std::string> inputs, outputs;
    std::vector<std::vector<float>> data;
    std::vector<Ort::Value> values;
    for (size_t i = 0; i < session.GetInputCount(); i++) {
      inputs.push_back(session.GetInputNameAllocated(i, allocator).get());
      const auto type = session.GetInputTypeInfo(i);
      auto shape = type.GetTensorTypeAndShapeInfo().GetShape();
      int64_t elements = 1;
      for (int64_t& size : shape) elements *= size < 0 ? size = 1 : size;
      data.emplace_back(size_t(elements), 0.5f);
      values.push_back(Ort::Value::CreateTensor<float>(memory, data.back().data(),
                                                       data.back().size(), shape.data(),
                                                       shape.size()));
    }
    for (size_t i = 0; i < session.GetOutputCount(); i++)
      outputs.push_back(session.GetOutputNameAllocated(i, allocator).get());
    std::vector<const char*> in, out;
    for (const std::string& name : inputs) in.push_back(name.c_str());
    for (const std::string& name : outputs) out.push_back(name.c_str());

    const auto results =
        session.Run(Ort::RunOptions(), in.data(), values.data(), in.size(), out.data(), out.size());
    for (size_t i = 0; i < results.size(); i++) {
      const auto shape = results[i].GetTensorTypeAndShapeInfo().GetShape();
      std::printf("%s [", out[i]);
      for (size_t a = 0; a < shape.size(); a++)
        std::printf("%s%lld", a ? ", " : "", static_cast<long long>(shape[a]));
      std::printf("] begins with %g\n", results[i].GetTensorData<float>()[0]);
    }
  } catch (const Ort::Exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
}
