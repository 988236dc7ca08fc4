// The ops for Python, by the fastest call there is: torch.ops takes 2 microseconds more. None: the arguments are not taken as
// they are; Python goes another way, or says what is wrong with them.

#include <torch/csrc/autograd/python_variable.h>

#include "dispatch.h"

namespace {

using mimic_core::MaybeNumber;
using mimic_core::MaybeTensor;
using mimic_core::Tensor;

bool is_tensor(PyObject* x) { return THPVariable_Check(x); }

MaybeTensor maybe_tensor(PyObject* x) { return x == Py_None ? std::nullopt : MaybeTensor(THPVariable_Unpack(x)); }

MaybeNumber maybe_number(PyObject* x) { return x == Py_None ? std::nullopt : MaybeNumber(PyFloat_AsDouble(x)); }

// Whether the arguments are tensors, by letter: t a tensor, m a tensor or None, n a number or None, b a bool, i an int.
bool are(PyObject* const* x, Py_ssize_t n, const char* kinds) {
  for (Py_ssize_t i = 0; i < n; ++i) {
    const bool none = x[i] == Py_None;
    switch (kinds[i]) {
      case 't': if (!is_tensor(x[i])) return false; break;
      case 'm': if (!none && !is_tensor(x[i])) return false; break;
      case 'n': if (!none && !PyFloat_Check(x[i]) && !PyLong_Check(x[i])) return false; break;
      case 'b': if (!PyBool_Check(x[i])) return false; break;
      case 'i': if (!PyLong_Check(x[i])) return false; break;
      default: return false;  // more than there should be
    }
  }
  return kinds[n] == '\0';
}

PyObject* wrapped(MaybeTensor found) {
  if (!found) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(*found));
}

PyObject* wrapped(std::optional<std::tuple<Tensor, Tensor>> found) {
  if (!found) Py_RETURN_NONE;
  return Py_BuildValue("(NN)", THPVariable_Wrap(std::get<0>(*found)), THPVariable_Wrap(std::get<1>(*found)));
}

// shifted_attention(q, k, v, vector, gate_weight, gate_bias, mask, scale, is_causal, follow), follow a number of `Follow`
PyObject* shifted_attention(PyObject*, PyObject* const* x, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (!are(x, n, "ttttttmnbi")) Py_RETURN_NONE;
  const Tensor &q = THPVariable_Unpack(x[0]), &k = THPVariable_Unpack(x[1]), &v = THPVariable_Unpack(x[2]),
               &vector = THPVariable_Unpack(x[3]), &weight = THPVariable_Unpack(x[4]), &bias = THPVariable_Unpack(x[5]);
  const auto mask = maybe_tensor(x[6]);
  const auto scale = maybe_number(x[7]);
  const bool is_causal = x[8] == Py_True;
  const auto follow = static_cast<mimic_core::Follow>(PyLong_AsLong(x[9]));
  MaybeTensor found;
  {
    pybind11::gil_scoped_release unlocked;
    found = mimic_core::shifted_attention(q, k, v, vector, weight, bias, mask, scale, is_causal, follow);
  }
  return wrapped(std::move(found));
  END_HANDLE_TH_ERRORS
}

// attention_with_lse(q, k, v, mask, scale, is_causal, follow)
PyObject* attention_with_lse(PyObject*, PyObject* const* x, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (!are(x, n, "tttmnbi")) Py_RETURN_NONE;
  const Tensor &q = THPVariable_Unpack(x[0]), &k = THPVariable_Unpack(x[1]), &v = THPVariable_Unpack(x[2]);
  const auto mask = maybe_tensor(x[3]);
  const auto scale = maybe_number(x[4]);
  const bool is_causal = x[5] == Py_True;
  const auto follow = static_cast<mimic_core::Follow>(PyLong_AsLong(x[6]));
  std::optional<std::tuple<Tensor, Tensor>> found;
  {
    pybind11::gil_scoped_release unlocked;
    found = mimic_core::attention_with_lse(q, k, v, mask, scale, is_causal, follow);
  }
  return wrapped(std::move(found));
  END_HANDLE_TH_ERRORS
}

// gated_shift(attn_out, query, lse, vector, gate_weight, gate_bias)
PyObject* gated_shift(PyObject*, PyObject* const* x, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (!are(x, n, "tttttt")) Py_RETURN_NONE;
  MaybeTensor found;
  {
    const Tensor &out = THPVariable_Unpack(x[0]), &q = THPVariable_Unpack(x[1]), &lse = THPVariable_Unpack(x[2]),
                 &vector = THPVariable_Unpack(x[3]), &weight = THPVariable_Unpack(x[4]), &bias = THPVariable_Unpack(x[5]);
    pybind11::gil_scoped_release unlocked;
    found = mimic_core::gated_shift(out, q, lse, vector, weight, bias);
  }
  return wrapped(std::move(found));
  END_HANDLE_TH_ERRORS
}

// virtual_context(attn_out, query, lse, keys, values, weight, scale)
PyObject* virtual_context(PyObject*, PyObject* const* x, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (!are(x, n, "ttttttn") || x[6] == Py_None) Py_RETURN_NONE;
  MaybeTensor found;
  {
    const Tensor &out = THPVariable_Unpack(x[0]), &q = THPVariable_Unpack(x[1]), &lse = THPVariable_Unpack(x[2]),
                 &keys = THPVariable_Unpack(x[3]), &values = THPVariable_Unpack(x[4]), &weight = THPVariable_Unpack(x[5]);
    const double scale = *maybe_number(x[6]);
    pybind11::gil_scoped_release unlocked;
    found = mimic_core::virtual_context(out, q, lse, keys, values, weight, scale);
  }
  return wrapped(std::move(found));
  END_HANDLE_TH_ERRORS
}

// norm_preserving_add(x, vector, scale), the scale a tensor or a number
PyObject* norm_preserving_add(PyObject*, PyObject* const* x, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (!are(x, n, "ttt") && !are(x, n, "ttn")) Py_RETURN_NONE;
  const Tensor &states = THPVariable_Unpack(x[0]), &vector = THPVariable_Unpack(x[1]);
  MaybeTensor scale;
  double number = 1;
  if (is_tensor(x[2])) scale = THPVariable_Unpack(x[2]);
  else number = maybe_number(x[2]).value_or(1);
  MaybeTensor found;
  {
    // For a decoded token, to release the GIL takes longer than the addition.
    std::optional<pybind11::gil_scoped_release> unlocked;
    if (states.numel() > 8192) unlocked.emplace();
    found = mimic_core::norm_preserving_add(states, vector, scale, number);
    if (!found && scale) found = mimic_core::norm_preserving_add_of_samples(states, vector, *scale);
  }
  return wrapped(std::move(found));
  END_HANDLE_TH_ERRORS
}

// The first arguments of the two below: query, keys, table, starts, lengths, scale, window
mimic_core::cpu::Paged paged(PyObject* const* x) {
  return {THPVariable_Unpack(x[0]), THPVariable_Unpack(x[1]), THPVariable_Unpack(x[2]), THPVariable_Unpack(x[3]),
          THPVariable_Unpack(x[4]), static_cast<float>(PyFloat_AsDouble(x[5])), PyLong_AsLong(x[6])};
}

// paged_lse(query, keys, table, starts, lengths, scale, window)
PyObject* paged_lse(PyObject*, PyObject* const* x, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (!are(x, n, "tttttni") || x[5] == Py_None) Py_RETURN_NONE;
  const auto call = paged(x);
  MaybeTensor found;
  {
    pybind11::gil_scoped_release unlocked;
    found = mimic_core::paged_lse(call);
  }
  return wrapped(std::move(found));
  END_HANDLE_TH_ERRORS
}

// paged_gated_shift(query, keys, table, starts, lengths, scale, window, out, vector, gate_weight, gate_bias, rows, strengths):
// whether it did
PyObject* paged_gated_shift(PyObject*, PyObject* const* x, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  if (!are(x, n, "tttttnitttttt") || x[5] == Py_None) Py_RETURN_FALSE;
  const auto call = paged(x);
  const Tensor &out = THPVariable_Unpack(x[7]), &vector = THPVariable_Unpack(x[8]), &weight = THPVariable_Unpack(x[9]),
               &bias = THPVariable_Unpack(x[10]), &rows = THPVariable_Unpack(x[11]), &strengths = THPVariable_Unpack(x[12]);
  bool done;
  {
    pybind11::gil_scoped_release unlocked;
    done = mimic_core::paged_gated_shift(call, out, vector, weight, bias, rows, strengths);
  }
  return PyBool_FromLong(done);
  END_HANDLE_TH_ERRORS
}

// set_up(bf16_instructions, compile): what Python knows of the processor, and its compiler of CUDA kernels,
// compile(options, device) -> bytes.
PyObject* set_up(PyObject*, PyObject* const* x, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(n == 2 && PyBool_Check(x[0]) && PyCallable_Check(x[1]), "set_up(bf16_instructions, compile)");
  mimic_core::bf16_instructions = x[0] == Py_True;
  Py_INCREF(x[1]);  // for as long as the process lives
  mimic_core::cuda::compile = [compile = x[1]](const std::string& options, int device) {
    pybind11::gil_scoped_acquire locked;
    PyObject* made = PyObject_CallFunction(compile, "si", options.c_str(), device);
    if (!made) throw python_error();
    std::string image;
    if (PyBytes_Check(made)) image.assign(PyBytes_AS_STRING(made), static_cast<size_t>(PyBytes_GET_SIZE(made)));
    Py_DECREF(made);
    return image;
  };
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// enable_cuda(device, taken): whether its tensors are taken from now on.
PyObject* enable_cuda(PyObject*, PyObject* const* x, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(n == 2 && PyLong_Check(x[0]), "enable_cuda(device, taken)");
  mimic_core::enable_cuda(PyLong_AsLong(x[0]), x[1] == Py_True);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// stand_in(taken): whether CPU tensors go the way of a GPU's, for tests.
PyObject* stand_in(PyObject*, PyObject* const* x, Py_ssize_t n) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(n == 1 && PyBool_Check(x[0]), "stand_in(taken)");
  mimic_core::stand_in = x[0] == Py_True;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

template <typename F>
PyCFunction function(F* f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {{"shifted_attention", function(shifted_attention), METH_FASTCALL, nullptr},
                         {"attention_with_lse", function(attention_with_lse), METH_FASTCALL, nullptr},
                         {"gated_shift", function(gated_shift), METH_FASTCALL, nullptr},
                         {"virtual_context", function(virtual_context), METH_FASTCALL, nullptr},
                         {"norm_preserving_add", function(norm_preserving_add), METH_FASTCALL, nullptr},
                         {"paged_lse", function(paged_lse), METH_FASTCALL, nullptr},
                         {"paged_gated_shift", function(paged_gated_shift), METH_FASTCALL, nullptr},
                         {"set_up", function(set_up), METH_FASTCALL, nullptr},
                         {"stand_in", function(stand_in), METH_FASTCALL, nullptr},
                         {"enable_cuda", function(enable_cuda), METH_FASTCALL, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module{PyModuleDef_HEAD_INIT, "mimic_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_mimic_native() { return PyModule_Create(&module); }
