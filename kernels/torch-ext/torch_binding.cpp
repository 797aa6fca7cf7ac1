// The extension module of the package for the Hugging Face Hub. Importing it registers the operators of csrc/ops.cpp in
// the namespace of this build; it has no functions. kernel-builder defines TORCH_EXTENSION_NAME and Py_LIMITED_API.
#include <Python.h>

#define SK_JOIN_(a, b) a##b
#define SK_JOIN(a, b) SK_JOIN_(a, b)
#define SK_STRING_OF(x) #x
#define SK_STRING(x) SK_STRING_OF(x)

PyMODINIT_FUNC SK_JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {};
  module.m_base = PyModuleDef_HEAD_INIT;
  module.m_name = SK_STRING(TORCH_EXTENSION_NAME);
  return PyModule_Create(&module);
}
