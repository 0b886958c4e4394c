package file_test

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// childEnv says what this program, started again by TestStore_kill, writes until
// it is killed: a childWork.
const childEnv = "METTLE_TEST_FILE_STORE_CHILD"

func TestMain(m *testing.M) {
	if work := os.Getenv(childEnv); work != "" {
		if err := writeUntilKilled(work); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}
