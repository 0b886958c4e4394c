//go:build linux

package worker_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	repb "github.com/bazelbuild/remote-apis/build/bazel/remote/execution/v2"

	"github.com/mettle-build/mettle/mettle/queue/mem"
	"github.com/mettle-build/mettle/mettle/worker"
	"github.com/mettle-build/mettle/mettle/worker/runner/sandbox"
)

// benchTools runs the same actions with tools that are kept running and without.
func benchTools(b *testing.B, request func(f *fixture, i int) request) {
	r, err := sandbox.New(sandbox.Options{})
	if err != nil {
		b.Skipf("this machine does not allow a sandbox: %v", err)
	}
	if err := r.Close(); err != nil {
		b.Error(err)
	}
	for name, keep := range map[string]int{"plain": 0, "persistent": 1} {
		b.Run(name, func(b *testing.B) {
			f := newFixture(b, func(o *worker.Options, _ *mem.Options) {
				o.Isolation, o.PersistentWorkers, o.Slots = worker.Namespaces, keep, 1
			}).start(b)
			f.run(b, request(f, -1), 0) // a tool that is kept is started
			i := 0
			for b.Loop() {
				f.run(b, request(f, i), 0)
				i++
			}
		})
	}
}

// A tool that takes 300 ms to start and none to work.
func BenchmarkWorker_persistent(b *testing.B) {
	benchTools(b, func(f *fixture, i int) request {
		req := f.toolRequest(b, "x", strconv.Itoa(i), "0")
		slow := f.put(b, "#!/bin/sh\nsleep 0.3\nexec ./main \"$@\"\n")
		req.root.Files = append(req.root.Files[:3], &repb.FileNode{Name: "main", Digest: f.put(b, shellTool), IsExecutable: true},
			&repb.FileNode{Name: "tool", Digest: slow, IsExecutable: true})
		return req
	})
}

// javaTool compiles, in a JVM that is kept running if it is to be.
const javaTool = `
import java.io.*;
import java.util.*;
import javax.tools.*;

public class Tool {
  public static void main(String[] args) throws Exception {
    if (!List.of(args).contains("--persistent_worker")) {
      String name = args[args.length - 1].substring(1);
      System.exit(compile(java.nio.file.Files.readAllLines(java.nio.file.Path.of(name)), System.err));
    }
    for (;;) {
      int size = varint();
      if (size < 0) return;
      List<String> arguments = arguments(System.in.readNBytes(size));
      ByteArrayOutputStream text = new ByteArrayOutputStream();
      int code = compile(arguments, text);
      ByteArrayOutputStream m = new ByteArrayOutputStream();
      m.write(8);
      write(m, code);
      m.write(18);
      write(m, text.size());
      text.writeTo(m);
      ByteArrayOutputStream out = new ByteArrayOutputStream();
      write(out, m.size());
      m.writeTo(out);
      System.out.write(out.toByteArray());
      System.out.flush();
    }
  }

  static int compile(List<String> arguments, OutputStream err) {
    return ToolProvider.getSystemJavaCompiler().run(null, err, err, arguments.toArray(new String[0]));
  }

  static List<String> arguments(byte[] data) throws IOException {
    List<String> all = new ArrayList<>();
    DataInputStream in = new DataInputStream(new ByteArrayInputStream(data));
    while (in.available() > 0) {
      int tag = varint(in);
      byte[] value = in.readNBytes(varint(in));
      if (tag == 10) all.add(new String(value, "UTF-8"));
    }
    return all;
  }

  static int varint() throws IOException { return varint(System.in); }

  static int varint(InputStream in) throws IOException {
    for (int value = 0, shift = 0; ; shift += 7) {
      int b = in.read();
      if (b < 0) return -1;
      value |= (b & 0x7f) << shift;
      if (b < 0x80) return value;
    }
  }

  static void write(OutputStream out, int value) throws IOException {
    for (; value >= 0x80 || value < 0; value >>>= 7) out.write(value & 0x7f | 0x80);
    out.write(value);
  }
}
`

// The compiler of Java, where there is one.
func BenchmarkWorker_javac(b *testing.B) {
	java, err := exec.LookPath("java")
	if err != nil {
		b.Skip(err)
	}
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Tool.java"), []byte(javaTool), 0o600); err != nil {
		b.Fatal(err)
	}
	if out, err := exec.CommandContext(b.Context(), "javac", "-d", dir, filepath.Join(dir, "Tool.java")).CombinedOutput(); err != nil {
		b.Skipf("javac: %v\n%s", err, out)
	}
	class, err := os.ReadFile(filepath.Join(dir, "Tool.class"))
	if err != nil {
		b.Fatal(err)
	}
	benchTools(b, func(f *fixture, i int) request {
		source := "class Hello { int value() { return " + strconv.Itoa(i) + "; } }\n"
		return request{
			root: &repb.Directory{Files: []*repb.FileNode{
				{Name: "Hello.java", Digest: f.put(b, source)},
				{Name: "Tool.class", Digest: f.put(b, string(class)), NodeProperties: &repb.NodeProperties{Properties: []*repb.NodeProperty{{Name: "bazel_tool_input"}}}},
				{Name: "flags", Digest: f.put(b, "-d\nout\nHello.java\n")},
			}},
			command: &repb.Command{Arguments: []string{java, "-cp", ".", "Tool", "@flags"}, OutputPaths: []string{"out/Hello.class"}},
			action:  &repb.Action{Platform: &repb.Platform{Properties: []*repb.Platform_Property{{Name: "persistentWorkerKey", Value: "javac"}}}},
		}
	})
}
