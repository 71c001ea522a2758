PYTHON ?= python3
VENV = .venv/bin

.PHONY: demo test soak lint peers cuda-fake clean

demo: .venv/run  ## the whole pipeline on an invented export: four minutes on two CPU cores
	$(VENV)/pip install --quiet --disable-pip-version-check "$$(sed -n 's/ *#.*//; /^gguf/p' requirements-extra.txt)"
	$(VENV)/python examples/demo.py

test: .venv/dev  ## all tests, on all cores
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q -n auto --dist worksteal tests

# 10,000 damaged exports and model files, 2,500 of each further messenger, 45 killed runs,
# hosts that lose their connection, 5,000 hostile requests, ten minutes of clients that come
# and go, memory over 300 steps
soak: .venv/dev  ## long tests
	MUTANTS=10000 KILLS=30 $(VENV)/python -m pytest -q -s tests/test_damage.py tests/test_lies.py tests/test_resume.py tests/test_hosts.py
	MUTANTS=2500 OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q -n auto -k mutat tests
	GROWTH=300 OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q -s tests/test_memory_growth.py
	CUT=30 OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q -k cut tests/test_telegram_bot.py
	HOSTILE=5000 TALKS=500 STORM=600 OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q tests/test_server.py

lint: .venv/dev  ## ruff and mypy, for Linux and for Windows
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy --no-error-summary
	$(VENV)/mypy --no-error-summary --platform win32 data.py plan.py chat.py

# llama.cpp, for bench.generate and tests/test_gguf.py. Needs a C++ compiler and a quarter of an hour.
peers: build/peers/done  ## llama.cpp, to compare with

build/peers/done: requirements-peers.txt
	$(PYTHON) -m venv build/peers
	build/peers/bin/pip install --quiet -r requirements-peers.txt
	build/peers/bin/pip download --quiet --no-deps --no-binary llama-cpp-python --dest build/peers $$(grep ^llama requirements-peers.txt)
	tar xzf build/peers/llama_cpp_python-*.tar.gz --directory build/peers --strip-components 1
	touch $@

# a 7B's training and decoding on GPUs that aren't there. Linux, a C compiler, 8 GB of disk.
cuda-fake: build/cuda-fake/done  ## CUDA without a GPU: compiled graphs, kernels, memory
	build/cuda-fake/bin/python -m bench.cuda_fake

build/cuda-fake/done: requirements.txt
	$(PYTHON) -m venv build/cuda-fake
	build/cuda-fake/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt requirements-extra.txt
	$(VENV)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv build
