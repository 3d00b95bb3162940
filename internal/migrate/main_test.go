package migrate_test

import (
	"os"
	"testing"

	"github.com/postrider/postrider/postridertest"
)

func TestMain(m *testing.M) { os.Exit(postridertest.Main(m)) }
